"""What a toy model must show before a study may stand on it: a measured number and two bars."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One demand on a toy model."""

    name: str
    """What is measured, in words that a reader of notebook 00 understands."""
    value: float
    """The measured number."""
    required: float
    """The bar that must be met."""
    desired: float | None = None
    """The bar that would be good to meet; reported only."""
    at_most: bool = False
    """Whether the bars are upper bounds."""
    n: int | None = None
    """How many items the number rests on."""

    def meets(self, bar: float, slack: float = 0.0) -> bool:
        """Whether the value is on the right side of `bar`, with `slack` allowed."""
        return self.value <= bar + slack if self.at_most else self.value >= bar - slack

    @property
    def passed(self) -> bool:
        """Whether the required bar is met."""
        return self.meets(self.required)
