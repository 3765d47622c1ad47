"""Bounds of what is read of a run directory, whoever made it. `agent/run/src/limits.rs` has the same.

A line that is beyond one of them costs what it tells of, and is named; everything else is served.
"""

LINE = 1 << 20
"""Bytes of a line of the manifest, with its newline."""
TEXT = 1 << 14
"""Characters of a name, a path or a reason."""
DIMS = 64
"""Dimensions of a tensor."""
AXES = 64
"""Mesh axes of a layout."""
BYTES = (1 << 63) - 1
"""Bytes of a tensor (dimensions of size 0 count as 1), and of a shard."""
RUN_FILE_BYTES = 64 << 20
"""Bytes of `run.json`."""
MODELS = 1024
"""Models in `run.json`."""
NOTICES = 4096
"""Notices in `run.json`."""
NODES = 4096
"""Runs of nodes in one folder."""
DEPTH = 127
"""Arrays and objects within each other in JSON, and names within each other in a module's name."""
OWNED = 1 << 24
"""Ranks counted while it is told which of them have a module."""
PROBLEMS = 1000
"""Problems that are named one by one; others are counted."""
NAMED = 16
"""Ranks, pieces or values that a message names one by one."""
MESSAGE = 500
"""Characters of somebody else's text in a message."""
