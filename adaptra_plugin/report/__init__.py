"""Where news goes: log lines, JSONL files, W&B, pictures. Reporting never blocks and never fails training."""

from adaptra_plugin.report.event import StragglerEvent
from adaptra_plugin.report.jsonl import JsonlWriter
from adaptra_plugin.report.reporter import Reporter
from adaptra_plugin.report.wandb_sink import WandbSink

__all__ = ["JsonlWriter", "Reporter", "StragglerEvent", "WandbSink"]
