# SPDX-License-Identifier: Apache-2.0
"""The read-only views that methods get: one class for each stage of the model.

Everything expensive is lazy: what a method does not ask for is not computed, and no view ever
holds attention for the whole model.
"""

from .cache import CacheView as CacheView
from .decoder import DecoderView as DecoderView
from .features import FeaturesView as FeaturesView
from .vision import VisionView as VisionView
