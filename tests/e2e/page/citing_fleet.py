"""A scripted fleet whose model cites."""

from __future__ import annotations

import re

from tests.unit.scripted_fleet import ScriptedFleet


class CitingFleet(ScriptedFleet):
    """One whose script may cite: `[[tides.md]]` is the marker of a passage from that file, as its prompt has it.

    Of several, `[[tides.md|turns]]` is the one with that word.
    """

    def tokens(self, text: str) -> list[int]:
        passages = re.findall(r'<passage id="(\w+)" source="([^"]+)">(.*?)</passage>', self.prompts[-1], re.DOTALL)

        def marker(match: re.Match[str]) -> str:
            name, _, words = match[1].partition("|")
            return f"[{next(id_ for id_, source, text in passages if source == name and words in text)}]"

        return super().tokens(re.sub(r"\[\[([^\]]+)\]\]", marker, text))
