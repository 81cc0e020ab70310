"""Publishing experiments: what the page names is copied, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.experiments.publish import publish

PAGE = """# Title
```{include} alignment/one/summary.md
```
![Accuracy](alignment/one/split-a/accuracy.svg) and {download}`rows <alignment/one/runs.csv>`
"""
SUMMARY = "# one\n\nMean.\n\n- note | x\n\n## split a\n\n| Accuracy | seeds |\n|---|---|\n"


@pytest.fixture
def folders(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    (results / "one" / "figures" / "split-a").mkdir(parents=True)
    (docs / "alignment").mkdir(parents=True)
    (results / "one" / "summary.md").write_text(SUMMARY)
    (results / "one" / "runs.csv").write_text("a,b\n")
    (results / "one" / "figures" / "split-a" / "accuracy.svg").write_text("<svg/>")
    (results / "one" / "figures" / "split-a" / "load.svg").write_text("<svg/>")
    (docs / "alignment" / "old.svg").touch()
    (docs / "alignment.md").write_text(PAGE)
    (docs / "published.md").write_text("{download}`more <alignment/two/runs.csv>`")
    (results / "two").mkdir()
    (results / "two" / "runs.csv").write_text("c\n")
    return results, docs


def test_what_the_page_names_is_there_and_nothing_else(folders):
    publish(*folders)
    alignment = folders[1] / "alignment"
    files = {str(path.relative_to(alignment)) for path in alignment.rglob("*") if path.is_file()}
    assert files == {"one/summary.md", "one/runs.csv", "one/split-a/accuracy.svg", "two/runs.csv"}
    assert (alignment / "one/summary.md").read_text() == "### split a\n\n| Accuracy | seeds |\n|---|---|\n"


def test_a_file_that_is_missing_is_named_and_nothing_is_changed(folders):
    (folders[0] / "two" / "runs.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"runs\.csv: is named in published\.md"):
        publish(*folders)
    assert (folders[1] / "alignment" / "old.svg").exists()
