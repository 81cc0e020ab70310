"""Put the results of experiments into the documentation.

Usage::

    fedmoe-sched experiment benchmarks/experiments/figure-3.toml --output results/figure-3
    python -m benchmarks.experiments.publish results

Takes from ``results/NAME`` what the pages ``docs/alignment.md`` and ``docs/published.md`` name as
``alignment/NAME/...``: tables (``summary.md``, without its title and notes), ``runs.csv`` and figures. Nothing
else is copied; what the pages no longer name is removed.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_PAGES = ("alignment.md", "published.md")
_NAMED = re.compile(r"alignment/([\w./-]+)")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.publish", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="folder with the outputs of the experiments")
    publish(parser.parse_args(arguments).results, _DOCS)


def publish(results: Path, docs: Path) -> None:
    """Copy what the pages name.

    Parameters
    ----------
    results : Path
        Holds one folder per experiment.
    docs : Path

    Raises
    ------
    FileNotFoundError
        A page names what no experiment has made; nothing was changed.
    """
    named = {name: page for page in _PAGES for name in _NAMED.findall((docs / page).read_text(encoding="utf-8"))}
    files = {name: _source(results, name) for name in sorted(named)}
    for name, file in files.items():
        if not file.is_file():
            msg = f"{file}: is named in {named[name]}, but there is no such file"
            raise FileNotFoundError(msg)
    shutil.rmtree(docs / "alignment", ignore_errors=True)
    for name, file in files.items():
        target = docs / "alignment" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(file, target)


def _source(results: Path, name: str) -> Path:
    experiment, _, file = name.partition("/")
    return results / experiment / ("figures" if file.endswith(".svg") else "") / file


def _tables(summary: str) -> str:
    """Drop all before the first table; titles one level deeper, as they come below a title of the page."""
    start = re.search(r"^(## |\| )", summary, flags=re.MULTILINE)
    return re.sub(r"^## ", "### ", summary[start.start() if start else 0 :], flags=re.MULTILINE)


if __name__ == "__main__":
    main()
