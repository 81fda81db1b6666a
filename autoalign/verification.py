"""Verifications: what a call of two networks shows of an alignment, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from autoalign.alignment import Alignment
from autoalign.causes import Divergence
from autoalign.comparing import OutputDifference
from autoalign.matches import Match

_SHOWN = 6  # matches that are listed


@dataclass(frozen=True, slots=True)
class Verification:
    """What a call of two networks shows of an alignment."""

    equal: bool  # the outputs are, and all that was compared on the way, with `alignment`
    max_difference: float  # the largest relative difference of the outputs, with `alignment`; inf if none compare
    first_divergence: Divergence | None  # where the models, as they were given, first differ
    alignment: Alignment  # the one that was verified, with any alternative that had to be taken
    taken: tuple[Match, ...] = ()  # what in `alignment` is other than it was, or was only proposed
    as_it_is: bool = True  # whether the target was called with its own values, not with the alignment's
    outputs: tuple[OutputDifference, ...] = ()
    tolerance: float = 0.0  # of `max_difference`
    compared: int = 0  # modules' inputs and outputs that were compared
    trials: int = 0  # calls of the target that were made to try alternatives
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "as it is" if self.as_it_is else "with the alignment's values"
        verdict = "NOT equal" if self.max_difference > self.tolerance else "equal"
        if verdict == "equal" and not self.equal:
            verdict = "equal, but NOT what modules compute on the way"
        lines = [
            f"The outputs are {verdict}: largest relative difference {self.max_difference:.1e}, "
            f"tolerance {self.tolerance:.0e}; {self.compared} inputs and outputs of modules compared, "
            f"the target called {how}."
        ]
        if self.first_divergence is not None:
            lines.append(f"First divergence: {self.first_divergence}")
        if self.taken:
            lines.append(f"{len(self.taken)} matches had to be taken otherwise, found in {self.trials} trials:")
            lines += [
                f"  {match.target} = {' + '.join(match.sources)}: {match.operation}" for match in self.taken[:_SHOWN]
            ]
            if len(self.taken) > _SHOWN:
                lines.append(f"  ... and {len(self.taken) - _SHOWN} more: verification.taken")
            lines.append("Load them: model.load_state_dict(verification.alignment.state_dict(), strict=False)")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])
