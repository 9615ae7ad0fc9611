"""What docs/add-a-method.md tells its reader to write and to type."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"


def guide() -> tuple[str, str, str]:
    """The method, its test and the command."""
    text = PAGE.read_text()
    code, test = re.findall(r"```python\n(.*?)```", text, re.S)
    (command,) = re.findall(r"`(pare run plugins=.*?)`", text)
    return code, test, command
