"""Runs another package's program with Nirvana's models known to it.

    python -m nirvana.launch lm_eval --model hf --model_args pretrained=FOLDER ...
    python -m nirvana.launch transformers serve FOLDER

A program that nobody told of Nirvana finds the models only in a process that has imported this
package; the alternative, code beside the weights that a loader executes, is not ours.
"""

import sys
from importlib.metadata import entry_points


def main() -> None:
    """Runs the console script that the first argument names, in this process, with the others."""
    _, *arguments = sys.argv
    scripts = entry_points(group="console_scripts", name=arguments[0]) if arguments else ()
    if not scripts:
        what = f"no program {arguments[0]!r} is installed" if arguments else "which program?"
        print(f"nirvana.launch: {what}: python -m nirvana.launch PROGRAM ...", file=sys.stderr)
        sys.exit(2)
    from nirvana import NirvanaForCausalLM

    # `transformers serve` looks a class up here, not in the Auto classes. The library replaces its
    # own entry while it imports itself, so a name bound by an import statement may be the old one.
    sys.modules["transformers"].NirvanaForCausalLM = NirvanaForCausalLM  # type: ignore[attr-defined]
    sys.argv = arguments
    (script,) = scripts
    sys.exit(script.load()())


if __name__ == "__main__":
    main()
