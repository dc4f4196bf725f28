"""Control: do nothing. Its row shows what the evaluation alone says."""

import dataclasses

from hf_nft.defenses.base import Context, Defense, Outcome


@dataclasses.dataclass(frozen=True)
class Identity(Defense):
    """Return the suspect as it came."""

    name = "identity"
    source = "control"

    def run(self, context: Context) -> Outcome:
        """Return the model untouched."""
        return Outcome(context.model, {})
