"""Makes `import consilience.model` work from a plain checkout, with nothing installed.

The folders at the root of the repository (`model/`, `rollout/`, …) are the subpackages of
`consilience`. An installed copy maps them through setuptools; here this module's own folder
serves as the package path, so a GPU machine or the working directory that Ray uploads needs no
install, and the tree at hand wins over an installed one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
