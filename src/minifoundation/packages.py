"""Whether an optional package is there, asked without importing it."""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import accumulate


def installed(module: str) -> bool:
    """Return whether ``module`` (``package``, or ``package.part``) can be imported; nothing is imported to find out.

    Python takes any folder on its path for a package: the clone beside which a program is started, or another project under the same
    name. Naming the part that is used tells them from the library.
    """
    top, *_ = names = list(accumulate(module.split("."), "{}.{}".format))
    spec = find_spec(top)
    for name in names[1:]:
        # Not find_spec: it imports the packages above, which takes seconds or fails.
        # As text, which PathFinder wants: once it is imported, transformers has a Path there.
        spec = spec and PathFinder.find_spec(name, [str(place) for place in spec.submodule_search_locations or ()])
    return spec is not None and spec.origin is not None  # a mere folder has no file that is imported
