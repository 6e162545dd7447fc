"""A NumPy array that carries attributes, such as the loader of a weight."""

from typing import Any

import numpy as np
import numpy.typing as npt


class Parameter(np.ndarray[Any, Any]):
    """
    A NumPy array that carries attributes.

    Views, slices, copies and pickles keep the class and the attributes; what arithmetic computes from a
    parameter is no parameter, but a plain array.

    Parameters
    ----------
    array : array_like
        Shared, not copied, if it is a NumPy array.
    **attributes
        Set on the new object.

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import Parameter
    >>> weight = Parameter(np.zeros((4, 2)), weight_loader=print, is_transposed=False)
    >>> weight[1:].is_transposed, type(weight + 1).__name__
    (False, 'ndarray')
    """

    def __new__(cls, array: npt.ArrayLike, **attributes: Any) -> "Parameter":
        parameter = np.asarray(array).view(cls)
        vars(parameter).update(attributes)
        return parameter

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Parameter):
            vars(self).update(vars(source))

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        if array is self:  # ``weight += 1`` stays what it was
            return self
        return array[()] if return_scalar else np.asarray(array)

    def __reduce__(self) -> Any:
        build, arguments, state = tuple(super().__reduce__())
        return build, arguments, (state, vars(self))

    def __setstate__(self, state: Any) -> None:
        array, attributes = state
        super().__setstate__(array)
        vars(self).update(attributes)

    def __deepcopy__(self, memo: dict[int, Any] | None) -> "Parameter":
        return self.copy()
