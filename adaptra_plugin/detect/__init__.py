"""What is slow, since when, and by how much. Pure: no torch, no host framework, no threads, no clocks of its own."""

from adaptra_plugin.detect.detector import Detector, links_of
from adaptra_plugin.detect.estimator import Estimator
from adaptra_plugin.detect.monitor import Finding
from adaptra_plugin.detect.overview import overview
from adaptra_plugin.detect.samples import IterationReport, LinkDelay, StageTimes

__all__ = ["Detector", "Estimator", "Finding", "IterationReport", "LinkDelay", "StageTimes", "links_of", "overview"]
