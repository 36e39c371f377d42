"""Tests run on the CPU; compiled programs are kept between runs where launch/common.sh says so."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
