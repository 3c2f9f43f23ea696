"""Agent-as-a-Judge: verdicts on a code agent's work, requirement by requirement, with the evidence they rest on (arXiv 2410.10934)."""

from . import metrics
from .devai import DevAI, Requirement, Task, TaskError
from .judge import Endpoint, EndpointError, HybridJudge, Job, JudgeConfig, LLMJudge, LocalJudge, OtherRun, Report, run, run_many
from .report import render, write_report
from .search import Index
from .static import Evidence, Scene, StaticJudge, Usage, Verdict
from .trajectory import Trajectory, TrajectoryError, TrajectoryRecorder
from .workspace import Document, Workspace, WorkspaceError

__all__ = ["DevAI", "Document", "Endpoint", "EndpointError", "Evidence", "HybridJudge", "Index", "Job", "JudgeConfig", "LLMJudge", "LocalJudge", "OtherRun", "Report", "Requirement",
           "Scene", "StaticJudge", "Task", "TaskError", "Trajectory", "TrajectoryError", "TrajectoryRecorder", "Usage", "Verdict", "Workspace", "WorkspaceError", "metrics", "render", "run", "run_many", "write_report"]
