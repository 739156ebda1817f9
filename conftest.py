"""What nbval compares: neither the warnings of libraries (copies keep no stderr) nor where the
repository lies.
"""

import re
from pathlib import Path


def pytest_collection_modifyitems(items):
    for notebook in {item.parent for item in items if hasattr(item.parent, "sanitize_patterns")}:
        notebook.skip_compare = (*notebook.skip_compare, "stderr")
        notebook.sanitize_patterns[re.escape(str(Path(__file__).resolve().parent)) + "/?"] = ""
