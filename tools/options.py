"""Write the table of options into docs/rbn.md: python tools/options.py."""

from pathlib import Path

from rbn_core.options import table

PAGE = Path(__file__).parents[1] / "docs" / "rbn.md"
BEGIN, END = "<!-- options: written by tools/options.py -->", "<!-- end of options -->"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
