"""Settings of a training run: checked, with TOML in and out; imports no torch."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedmoe_sched.errors import InputError

__all__ = [
    "ClientsConfig",
    "DataConfig",
    "DevicesConfig",
    "LocalConfig",
    "ModelConfig",
    "TrainConfig",
    "checked",
    "read_toml",
]

Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_Model = TypeVar("_Model", bound=BaseModel)

# What may differ between a run and its continuation.
_FREE_SETTINGS = (("rounds",), ("workers",), ("data", "dir"), ("data", "download"), ("devices", "dir"))


class _Section(BaseModel):
    """A group of settings: immutable, unknown keys refused, numbers not taken from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class PatchesConfig(_Section):
    """Features that take the place of the pixels, see `fedmoe_sched.federated.patches`.

    Parameters
    ----------
    filters : int
        k, the filters of the dictionary.
    size : int
        Side of a patch in pixels.
    grid : int
        Responses are averaged over ``grid x grid`` cells.
    threshold : float
        Of the soft threshold.
    components : int
        Features per image: principal components of the averaged responses.
    images : int
        Training images that the server keeps to learn the extractor from, without labels; no client gets them.
    """

    filters: Count = 144
    size: Annotated[int, Field(ge=2)] = 6
    grid: Count = 3
    threshold: AtLeastZero = 0.25
    components: Count = 512
    images: Annotated[int, Field(ge=2)] = 2000


class DataConfig(_Section):
    """What is learnt.

    Parameters
    ----------
    name : {"digits", "fashion-mnist", "cifar10"}
        ``digits`` ships with scikit-learn and needs no file.
    dir : str, optional
        Folder of the data files; else the environment variable ``FEDMOE_SCHED_DATA``.
    download : bool
        Fetch missing files from the publisher into the folder and check their checksums.
    train_samples, test_samples : int, optional
        Use a stratified, seeded part only.
    patches : PatchesConfig, optional
        Train on features of a frozen extractor instead of pixels.
    """

    name: Literal["digits", "fashion-mnist", "cifar10"] = "digits"
    dir: str | None = None
    download: bool = False
    train_samples: Count | None = None
    test_samples: Count | None = None
    patches: PatchesConfig | None = None


class ClientsConfig(_Section):
    """Who learns, on which part of the data.

    Parameters
    ----------
    count : int
        n, the number of clients.
    capacity : int or list of int
        The most experts per client and round; a list is repeated over the clients.
    split : {"classes", "dirichlet", "iid", "domains"}
        How the training samples are dealt out, see `fedmoe_sched.federated.partition`.
    classes_per_client : int
        For ``classes``.
    alpha : float
        Concentration for ``dirichlet``; small is uneven.
    domains : int
        For ``domains``: number of client groups with disjoint class sets. With a shift: number of client groups
        that see the classes differently.
    shift : {"none", "rotate", "relabel"}
        Difference between domains with the same classes, see `fedmoe_sched.federated.preparation`: images turned
        by a multiple of 90 degrees (from the fifth domain on mirrored first), with ``relabel`` class numbers
        shifted too. At most 8 domains; not with the split ``domains``.
    min_samples : int
        The fewest samples of any client.
    participation : float
        Share of the clients that is available in a round, 0 to 1; at least one client always is.
    failure_rate : float
        Probability that an available client does not answer.
    cache : {"none", "current", "stale"}
        Experts that a client need not be sent since it has a copy: none; those that nobody else has changed since;
        also those that others have, up to `max_staleness`. See `fedmoe_sched.federated.methods.cached`.
    max_staleness : int
        Rounds up to which a stale copy will do, for ``stale``. Policies count as held what will do, unless their
        own option ``max_staleness`` says otherwise.
    """

    count: Count = 20
    capacity: Count | list[Count] = [1, 2]
    split: Literal["classes", "dirichlet", "iid", "domains"] = "classes"
    classes_per_client: Count = 2
    alpha: Positive = 0.3
    domains: Count = 5
    shift: Literal["none", "rotate", "relabel"] = "none"
    min_samples: Count = 8
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    failure_rate: Rate = 0.0
    cache: Literal["none", "current", "stale"] = "none"
    max_staleness: Count = 1

    @model_validator(mode="after")
    def _capacity_not_empty(self) -> Self:
        if self.capacity == []:
            msg = "capacity: the list must not be empty"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _staleness_has_an_effect(self) -> Self:
        if self.max_staleness != 1 and self.cache != "stale":
            msg = f"max_staleness = {self.max_staleness}: needs cache = 'stale', not {self.cache!r}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _shift_fits(self) -> Self:
        if self.shift != "none" and self.split == "domains":
            msg = f"shift = {self.shift!r}: the split 'domains' has domains of its own; use another split"
            raise ValueError(msg)
        if self.shift != "none" and not self.domains <= min(8, self.count):
            msg = f"domains = {self.domains}: with a shift must be <= {min(8, self.count)}"
            raise ValueError(msg)
        return self

    @property
    def oldest_copy(self) -> int | None:
        """Rounds up to which a copy will do after others have changed the expert; None without copies."""
        return {"none": None, "current": 0, "stale": self.max_staleness}[self.cache]

    def capacities(self) -> tuple[int, ...]:
        """Capacity of every client; ``count`` numbers."""
        values = [self.capacity] if isinstance(self.capacity, int) else self.capacity
        return tuple(values[i % len(values)] for i in range(self.count))


class ModelConfig(_Section):
    """The global Mixture-of-Experts model, see `fedmoe_sched.federated.model`.

    Parameters
    ----------
    experts : int
        m, the number of experts.
    channels : list of int
        Output channels of the shared convolution blocks (each halves height and width); empty for none, where the
        data are features already.
    expert_channels : list of int
        The same for blocks inside every expert; empty makes experts plain heads.
    expert_hidden : int or list of int
        Width of an expert's hidden layer, 0 for a linear head; a list is repeated over the experts.
    pool : int
        Feature maps are averaged to ``pool x pool`` before heads and gate.
    routing : {"soft", "top-k"}
        Mix all held experts, or the `top_k` that the gate ranks highest.
    top_k : int
        For ``top-k`` routing.
    """

    experts: Count = 5
    channels: list[Count] = [16, 32]
    expert_channels: list[Count] = []
    expert_hidden: Width | Annotated[list[Width], Field(min_length=1)] = 32
    pool: Count = 2
    routing: Literal["soft", "top-k"] = "soft"
    top_k: Count = 1

    def hidden_of(self, expert: int) -> int:
        """Width of the hidden layer of one expert."""
        if isinstance(self.expert_hidden, int):
            return self.expert_hidden
        return self.expert_hidden[expert % len(self.expert_hidden)]

    @property
    def routed(self) -> int | None:
        """Experts mixed per sample; None for all."""
        return self.top_k if self.routing == "top-k" else None


class LocalConfig(_Section):
    """Local training of one client in one round, see `fedmoe_sched.federated.client`.

    Parameters
    ----------
    epochs, batch_size : int
    learning_rate : float
        Of stochastic gradient descent.
    gate_learning_rate : float, optional
        Of the gate; `learning_rate` by default.
    momentum, weight_decay : float
    clip_norm : float
        Gradients are scaled down to this Euclidean norm; 0 for no clipping.
    train_extractor, train_gate : bool
        Whether clients train the shared parts too.
    routing_weight : float
        Weight of the routing loss, which teaches the gate over all experts to send this client's samples to
        the experts it holds; 1.0 is the likelihood of the whole mixture without the experts it does not hold.
    reward : {"accuracy", "loss", "frequency"}
        What the client reports per expert, see `fedmoe_sched.scores`.
    reward_at : {"before", "after"}
        Whether experts are judged as received (how well the global expert suits this client's data) or after
        local training (how well it adapts).
    """

    epochs: Count = 2
    batch_size: Count = 32
    learning_rate: Positive = 0.1
    gate_learning_rate: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: AtLeastZero = 0.0
    clip_norm: AtLeastZero = 5.0
    train_extractor: bool = True
    train_gate: bool = True
    routing_weight: AtLeastZero = 1.0
    reward: Literal["accuracy", "loss", "frequency"] = "accuracy"
    reward_at: Literal["before", "after"] = "before"


class DevicesConfig(_Section):
    """The devices of the clients and the simulated clock, see `fedmoe_sched.federated.devices` and ``clock``.

    Parameters
    ----------
    source : {"none", "synthetic", "phones"}
        No devices: time has no meaning. Drawn from distributions near those of real phones; needs no file. Drawn
        from measurements of real phones, paired at random.
    dir : str, optional
        Folder of the measurements for ``phones``; else ``device_traces`` in the folder of the data (`DataConfig`),
        or that folder itself.
    bandwidth : {"updown", "mobiperf"}
        For ``phones``: download and upload of 19 users; or downloads of 91 phones, mostly on WiFi and about ten
        times as fast, with the up/down ratio of one of the 19 users.
    availability : bool
        Clients come and go as their devices do; else they are always there.
    min_available : int
        A round begins when so many of the clients that may take part are there.
    deadline : float, optional
        Simulated seconds after which a round ends; the policy plans for it, and who is not done is a straggler.
    memory_share : float
        Share of a device's RAM that training may use. Our choice: an app may hardly take more than a quarter.
    memory_overhead : float
        Memory per byte of parameters, >= 1; with gradients and Adam's two moments 4.
    speed_scale : float
        The measured milliseconds of an inference are relative: the model that was timed is not known. This factor
        makes them milliseconds per sample of the model that is trained.
    expert_compute, shared_compute : float
        Work of a sample in one expert, and in the shared parts, in units of the measured inference.
    expert_bytes, shared_bytes : float, optional
        Size of one expert (of the largest), and of the shared parts; by default those of the model, in float32.
        Larger ones make it stand for a larger model in time, traffic and memory.
    jitter : float
        Spread of a client's round time around the model of it: the standard deviation of its logarithm.
    """

    source: Literal["none", "synthetic", "phones"] = "none"
    dir: str | None = None
    bandwidth: Literal["updown", "mobiperf"] = "updown"
    availability: bool = False
    min_available: Count = 1
    deadline: Positive | None = None
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    memory_overhead: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    speed_scale: Positive = 1.0
    expert_compute: AtLeastZero = 1.0
    shared_compute: AtLeastZero = 0.0
    expert_bytes: Positive | None = None
    shared_bytes: AtLeastZero | None = None
    jitter: AtLeastZero = 0.0

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> Self:
        needs_clock = {"availability": False, "deadline": None, "jitter": 0.0}
        for name, default in needs_clock.items():
            if self.source == "none" and getattr(self, name) != default:
                msg = f"{name} = {getattr(self, name)}: needs devices: set source to 'synthetic' or 'phones'"
                raise ValueError(msg)
        if self.min_available > 1 and not self.availability:
            msg = f"min_available = {self.min_available}: needs availability = true"
            raise ValueError(msg)
        if self.bandwidth == "mobiperf" and self.source != "phones":
            msg = f"bandwidth = 'mobiperf': needs source = 'phones', not {self.source!r}"
            raise ValueError(msg)
        return self


class TrainConfig(_Section):
    """All settings of a training run.

    In TOML the sections are tables (``[clients]``); keys may be written with ``-`` or ``_``.

    Parameters
    ----------
    policy : str
        Alignment policy by name, see `fedmoe_sched.policies`.
    policy_options : dict
        Keyword arguments of the policy (``balance``, ``usage_weight``, ``solver``, ...). TOML knows no None: the
        text ``"none"`` stands for it.
    rounds : int
    seed : int
        Of data split, model, client sampling, local training and policy.
    data : DataConfig
    clients : ClientsConfig
    model : ModelConfig
    local : LocalConfig
    devices : DevicesConfig
    device : str
        A torch device; it has nothing to do with `devices`.
    threads : int
        Threads of torch in every process; 1 keeps results the same on machines of any size.
    workers : int
        Clients trained at the same time, each in a process of its own if more than 1; does not change results.
        Must be 1 on devices other than the CPU.
    report_seconds : bool
        Tell the policy the measured wall time of each client. Off by default: a policy that plans by measured
        times cannot be replayed exactly. With `devices` it is told simulated times instead.
    """

    policy: Annotated[str, Field(min_length=1)] = "balanced"
    policy_options: dict[str, Any] = {}
    rounds: Count = 40
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    model: ModelConfig = ModelConfig()
    local: LocalConfig = LocalConfig()
    devices: DevicesConfig = DevicesConfig()
    device: str = "cpu"
    threads: Count = 1
    workers: Count = 1
    report_seconds: bool = False

    @field_validator("policy_options")
    @classmethod
    def _none_by_name(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: None if value == "none" else value for key, value in options.items()}

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> Self:
        if self.model.routing == "top-k" and self.model.top_k > self.model.experts:
            msg = f"model.top_k = {self.model.top_k}: must be <= model.experts = {self.model.experts}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _one_kind_of_seconds(self) -> Self:
        if self.report_seconds and self.devices.source != "none":
            msg = f"report_seconds = True: with devices.source = {self.devices.source!r} times are simulated"
            raise ValueError(msg)
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """Check nested plain values.

        Parameters
        ----------
        values : mapping
            Nested like the TOML file; keys with ``-`` or ``_``.
        source : str
            Where the values come from, for messages.

        Raises
        ------
        InputError
            Names every key and value at fault: ``run.toml: clients.count = -1: ...``.
        """
        return checked(cls, values, source)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainConfig:
        """Read a TOML file.

        Raises
        ------
        InputError
            No such file, not TOML, or a wrong setting.
        """
        return cls.from_dict(read_toml(path, "config file"), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values with kebab-case keys, without settings that are None."""
        values: dict[str, Any] = _kebab_keys(self.model_dump(mode="json", exclude_none=True))
        # Options are keyword arguments of the policy: their own spelling is kept.
        values["policy-options"] = {k: "none" if v is None else v for k, v in self.policy_options.items()}
        return values

    def to_toml(self) -> str:
        """Return the settings as the text of a TOML file that `from_toml` reads back to the same settings."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    def updated(self, changes: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Return a copy with some settings replaced.

        Parameters
        ----------
        changes : mapping
            Dotted key to value, e.g. ``{"clients.count": 50, "policy": "greedy"}``; None resets an optional one.
        source : str
            Where the changes come from, for messages.

        Raises
        ------
        InputError
            Unknown key or wrong value.
        """
        values = self.model_dump()
        for key, value in changes.items():
            *sections, last = key.replace("-", "_").split(".")
            table = values
            for section in sections:
                table = table.setdefault(section, {})
                if not isinstance(table, dict):
                    msg = f"{source}: {key} = {value!r}: {section} holds no settings of its own"
                    raise InputError(msg)
            table[last] = value
        return type(self).from_dict(values, source=source)

    def refuse_to_continue(self, config_file: Path) -> None:
        """Refuse these settings for going on with a run that was started with others.

        ``rounds``, ``workers`` and where the data lie may differ.

        Parameters
        ----------
        config_file : Path
            ``config.toml`` of the run folder.

        Raises
        ------
        InputError
            Names the run folder and the first setting that differs.
        """
        old, new = TrainConfig.from_toml(config_file).model_dump(), self.model_dump()
        for settings in (old, new):
            for *sections, last in _FREE_SETTINGS:
                table = settings
                for section in sections:
                    table = table[section]
                del table[last]
        different = _first_difference(old, new)
        if different is not None:
            key, was, now = different
            msg = f"run folder {config_file.parent}: {key} = {now!r}, but the run was started with {was!r}"
            raise InputError(msg)


def _first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found = _first_difference(was, now, f"{prefix}{key}.")
            if found is not None:
                return found
        elif was != now:
            return f"{prefix}{key}", was, now
    return None


def read_toml(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a TOML file.

    Parameters
    ----------
    path : path
    kind : str
        What to call it in messages.

    Raises
    ------
    InputError
        No such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{kind} {path}: cannot be read ({error.strerror})"
        raise InputError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{kind} {path}: is not TOML ({error})"
        raise InputError(msg) from error


def checked(model: type[_Model], values: Mapping[str, Any], source: str) -> _Model:
    """Make a pydantic model of nested plain values, keys with ``-`` or ``_``.

    Raises
    ------
    InputError
        Names source, every key and every value at fault in one line.
    """
    try:
        return model.model_validate(_snake_keys(values, source))
    except ValidationError as error:
        raise InputError(_message(source, error, model)) from None


def _snake_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in answer:
            msg = f"{source}: {name}: is given twice, as {key!r} and in the other spelling"
            raise InputError(msg)
        answer[name] = _snake_keys(value, source) if isinstance(value, Mapping) else value
    return answer


def _kebab_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.replace("_", "-"): _kebab_keys(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _message(source: str, error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        # Tags of union branches ("int", "list[...]") are no part of the key.
        path = [str(part) for part in item["loc"] if not str(part).startswith(("constrained", "list["))]
        path = [part for part in path if part not in {"int", "str", "float"}]
        key = ".".join(path)
        if item["type"] == "extra_forbidden":
            lines.append(f"{source}: {key}: unknown setting{_suggestion(path, model)}")
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
            lines.append(f"{source}: {key + '.' if key else ''}{text}")
        else:
            lines.append(f"{source}: {key} = {item['input']!r}: {item['msg']}")
    return "; ".join(dict.fromkeys(lines))


def _suggestion(path: list[str], model: type[BaseModel]) -> str:
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    close = difflib.get_close_matches(path[-1], model.model_fields, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(model.model_fields)})"
