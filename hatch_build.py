"""The README as the description on PyPI, where links to files of the repository lead nowhere.

If `[project.urls]` names the `Repository`, links and pictures lead there. Otherwise a link becomes its text, and a
picture is left out. Links within code are not changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE = re.compile(r"^(```.*?^```$)", re.S | re.M)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)([^)\s]+)\)")
IMAGE = re.compile(r'<img src="(?!https?://)([^"]+)"([^>]*)>\n*')


def description(readme: str, repository: str | None) -> str:
    """The README with links that do not depend on the folder."""

    def link(match: re.Match[str]) -> str:
        if repository is None:
            return match[1]
        place = repository if match[2].startswith("#") else f"{repository}/blob/main/"
        return f"[{match[1]}]({place}{match[2]})"

    def image(match: re.Match[str]) -> str:
        return "" if repository is None else f'<img src="{repository}/raw/main/{match[1]}"{match[2]}>\n\n'

    parts = CODE.split(readme)
    return "".join(part if i % 2 else IMAGE.sub(image, LINK.sub(link, part)) for i, part in enumerate(parts))


class CustomMetadataHook(MetadataHookInterface):
    """Sets `readme` in the metadata of the distribution."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read README.md, and set it with the links of `description`."""
        readme = (Path(self.root) / "README.md").read_text("utf-8")
        address = metadata.get("urls", {}).get("Repository")
        text = description(readme, address.rstrip("/") if address else None)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
