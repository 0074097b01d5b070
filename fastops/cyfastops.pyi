# SPDX-License-Identifier: BSD-3-Clause
# The functions of cyfastops.pxd, which Cython modules cimport; there is nothing here for Python but their addresses.

from typing import Any

__pyx_capi__: dict[str, Any]
