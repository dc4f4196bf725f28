"""Settings of the NFT adapter, stored as `adapter_config.json`.

What the user asks for (`placement`, `target_modules`, ...) and what came of it (`resolved_*`, `input_units`,
`statistics_modules`) are kept apart: an adapter is loaded from the latter alone, so that a later change of the
placement rules never moves the masks of an adapter that is already saved.
"""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from peft import PeftConfig, PeftType

from hf_nft.errors import ConfigError

PLACEMENTS = ("auto", "bn", "norm", "units", "channels")


def add_peft_type(name: str) -> PeftType:
    """Return the member of PEFT's closed `PeftType` enum of that name, adding it first if it is missing.

    PEFT has no plug-in entry point, and transformers reads `peft_type.value`, so the type must be a real member.

    Args:
        name: Upper-case name of the PEFT method.

    Returns:
        The enum member, the same object at every call.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__dict__["__objclass__"] = PeftType
        member.__dict__["_sort_order_"] = len(PeftType.__members__)
        setattr(PeftType, name, member)  # before _member_map_: EnumType forbids reassigning a member
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType[name]


NFT = add_peft_type("NFT")


def _package_version() -> str:
    """Version of the installed hf-nft, or `unknown` when it runs from a bare folder."""
    try:
        return version("hf-nft")
    except PackageNotFoundError:
        return "unknown"


@dataclass
class NFTConfig(PeftConfig):
    """Where the masks go and how they act.

    Raises:
        ConfigError: If one or more settings are wrong; the message lists all of them.

    Source: defenses.md 1.3 and 1.10 (placement, bias and stem rules of the NFT release).
    """

    placement: str = field(
        default="auto",
        metadata={
            "help": "Which neurons get a mask: 'bn' (gain of every BatchNorm), 'norm' (gain of every affine norm), "
            "'units' (attention heads and MLP hidden units), 'channels' (output channels), or 'auto': "
            "the first of bn, units, norm, channels that the model has."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Explicit modules instead of a placement: full names or dotted suffixes; a single string is a "
            "regular expression over full names. With placement 'units' a linear layer is masked on its input, with "
            "'channels' on its output."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that never get a mask; same syntax as target_modules."}
    )
    mask_bias: bool = field(
        default=False,
        metadata={
            "help": "False: z = m * (response without bias) + bias. True: the bias is scaled too, so that a mask of 0 "
            "silences the neuron. Has no effect on masks of a layer's inputs."
        },
    )
    mask_stem: bool = field(
        default=False,
        metadata={"help": "Also mask layers that come before the first numbered block (the release does not)."},
    )
    init_mask: float = field(default=1.0, metadata={"help": "Value all masks start at, in (0, 1]. 1 is the identity."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved in full besides the masks."}
    )
    resolved_placement: str | None = field(
        default=None, metadata={"help": "Filled in: the placement that was used, 'explicit' for target_modules."}
    )
    resolved_modules: list[str] | None = field(
        default=None, metadata={"help": "Filled in: full names of the masked modules, in registration order."}
    )
    input_units: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Filled in: modules masked on their input, with the number of masks (heads, hidden units)."},
    )
    statistics_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Filled in: unmasked BatchNorms whose running statistics the adapter owns."},
    )
    hf_nft_version: str | None = field(default=None, metadata={"help": "Filled in: version of hf-nft that wrote this."})

    def __post_init__(self) -> None:
        """Check all fields together and bring collections into a form that JSON keeps."""
        super().__post_init__()
        self.peft_type = NFT
        if self.hf_nft_version is None:
            self.hf_nft_version = _package_version()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple | frozenset):
                setattr(self, name, sorted(value))
        problems = self._problems()
        if problems:
            raise ConfigError("NFTConfig: " + " ".join(problems))

    def _problems(self) -> list[str]:
        """One sentence per wrong field."""
        problems = []
        if self.placement not in PLACEMENTS:
            problems.append(f"placement must be one of {', '.join(PLACEMENTS)}, found {self.placement!r}.")
        if isinstance(self.init_mask, bool) or not isinstance(self.init_mask, int | float):
            problems.append(f"init_mask must be a number in (0, 1], found {self.init_mask!r}.")
        elif not 0.0 < self.init_mask <= 1.0:
            problems.append(f"init_mask must be in (0, 1], found {self.init_mask}; 1 leaves the model unchanged.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
                problems.append(f"{name} must hold module names, found {value!r}.")
            if value is not None and not value:
                problems.append(f"{name} is empty; leave it out to let placement={self.placement!r} decide.")
        if self.target_modules is not None and self.placement in ("bn", "norm"):
            problems.append(
                f"target_modules and placement={self.placement!r} contradict each other; drop one of them "
                "(placement 'units' or 'channels' may accompany target_modules to pick the side)."
            )
        return problems
