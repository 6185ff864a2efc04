"""A Python for ESPnet's recipes that knows `adapter_type: ssvdo`: `python -m ssvdo_kernels.integrations.espnet.run`.

    ./asr.sh --python "python3 -m ssvdo_kernels.integrations.espnet.run" ...
    python3 -m ssvdo_kernels.integrations.espnet.run -m espnet2.bin.asr_inference --asr_model_file ...

With `-m MODULE` of ESPnet the module runs here, after our import; anything else runs as plain Python would run it.
Processes that it spawns import this module as their main one, and with it the integration.
"""

import os
import runpy
import sys

import ssvdo_kernels.integrations.espnet  # noqa: F401


def main() -> None:
    """Runs what the command line names."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["-m"] or len(arguments) < 2 or not arguments[1].startswith("espnet"):
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__")  # without alter_sys: this stays the main module for `spawn`


if __name__ == "__main__":
    main()
