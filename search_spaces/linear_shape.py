"""The shape of one kind of adaptable matrix: what readers of a config produce."""

from dataclasses import dataclass

from search_spaces.doctrine import COMPONENTS


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """`count` matrices of one shape and name in a model.

    Attributes:
        name: suffix of the module's (for experts: the parameter's) name in transformers 5, long
            enough to tell components apart: 'q_proj', 'attn.c_proj', 'experts.down_proj'.
        in_features: inputs, >= 1.
        out_features: outputs, >= 1.
        component: 'attn', 'mlp', 'experts' or 'unembed'.
        count: layers that hold it; for experts layers x experts.
    """

    name: str
    in_features: int
    out_features: int
    component: str
    count: int

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise ValueError(f"component must be one of {COMPONENTS}, got {self.component!r}")
        if min(self.in_features, self.out_features, self.count) < 1:
            raise ValueError(f"in_features, out_features and count must be >= 1, got {self}")

    @property
    def num_params(self) -> int:
        """Weights of all `count` matrices; biases are not counted."""
        return self.in_features * self.out_features * self.count

    @property
    def smallest_side(self) -> int:
        """Largest rank that a product of two factors can have here."""
        return min(self.in_features, self.out_features)
