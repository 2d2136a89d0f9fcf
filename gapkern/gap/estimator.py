"""What `MeanShift` and the baselines share: scikit-learn's contract for estimators, without scikit-learn.

`__init__` assigns its arguments as they are, fitting checks them, and what was learned ends in an underscore. So
`sklearn.base.clone`, pipelines and parameter searches work where scikit-learn is installed.
"""

import inspect
from typing import Any, TypeVar

__all__ = ["Estimator", "NotFittedError"]

_E = TypeVar("_E", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """Use before fitting; a ValueError and an AttributeError, as scikit-learn's is."""


class Estimator:
    """Parameters by name, and whether they were fitted.

    Example:
        >>> from gapkern import MeanShift
        >>> MeanShift(n_components=3).get_params()["n_components"]
        3
        >>> MeanShift().set_params(alpha=0.5)
        MeanShift(alpha=0.5, n_components='auto', moves='gallery', normalize=False, agreement=0.99, model=None)
    """

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "args", "kwargs")]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of `__init__` by name."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: _E, **parameters: Any) -> _E:
        """Assigns arguments of `__init__`; what was fitted stays. Returns self.

        Raises:
            ValueError: no argument of that name; nothing is assigned then.
        """
        known = self._parameters()
        for name in parameters:
            if name not in known:
                raise ValueError(f"{type(self).__name__}: expected parameters out of {', '.join(known)}, got {name!r}")
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def check_parameters(self: _E) -> _E:
        """Raises what fitting would raise of the parameters. Returns self.

        Raises:
            TypeError, ValueError: a parameter of a wrong type or out of range.
        """
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type=None, target_tags=TargetTags(required=True))
