"""The shipped studies, as tests change them."""

import dataclasses


def with_run(made, name, **changes):
    runs = tuple(dataclasses.replace(r, **changes) if r.name == name else r for r in made.run)
    return dataclasses.replace(made, run=runs)
