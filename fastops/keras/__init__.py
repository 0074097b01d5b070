# SPDX-License-Identifier: BSD-3-Clause
"""fastops for Keras 3: layers of attention, and a callback that averages the weights of any model.

Needs keras with its backend torch or jax, which `import fastops` never loads.
"""

from __future__ import annotations

try:
    import keras as _keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ImportError("fastops.keras needs keras: pip install 'fastops[keras]'", name="keras") from None
    if (error.name or "").partition(".")[0] == "tensorflow":
        raise ImportError(
            "fastops.keras works with Keras's backends torch and jax: set KERAS_BACKEND, since Keras chose tensorflow, "
            "which is not installed",
            name="tensorflow",
        ) from None
    raise

from ._averaging import EMA
from ._layers import LinearAttention, NystromAttention, SoftmaxAttention

__all__ = ["EMA", "LinearAttention", "NystromAttention", "SoftmaxAttention"]

del _keras
