"""Pare: a distributed experiment platform for making models smaller and better.

This package is only the door. The rooms stand at the top of the repository and install beneath it:
`pare.methods`, `pare.workers`, `pare.orchestrator`, `pare.tracking`, `pare.conf`.
"""

__version__ = "0.1.0"
