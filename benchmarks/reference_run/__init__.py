"""The reference run: small trainings of one recipe and its variants, kept, so that a change can be measured against it
(docs/reference-run.md).

    python -m benchmarks.reference_run fashion-mnist --work WORK   train, evaluate, and write results/fashion-mnist.json
    python -m benchmarks.reference_run openmoji --work WORK
    python -m benchmarks.reference_run.plot                        draw docs/reference-run.png from both

The same command resumes after an interruption, but for the plain loop, which starts again.
"""
