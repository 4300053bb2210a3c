"""The verbs of `lpl`, listed in `lpl_jax.tools.verbs`."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m lpl_jax.tools.X runs this first: there is one front door
    from lpl_jax.tools.verbs import verb_of

    print(f"error: lpl_jax.tools holds no programs: call lpl {verb_of(sys.orig_argv)}", file=sys.stderr)
    raise SystemExit(2)
