"""One command that proves the CUDA path: `python -m specache.bench.gpu_check` (`make gpu-check`).

`part_runner` runs the parts of `parts`, each in a process of its own with a time limit (`process`),
and writes what they found (`result_page`) before the next one begins. A part is a module with a
function `run(part)`, which makes its checks through `checks.PartRun`. `--device cpu` runs all of it
on tiny sizes without a GPU (`simulation`), so that a mistake in the script shows there.
"""
