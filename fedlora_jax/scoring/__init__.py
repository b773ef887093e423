"""Judging what a language model wrote: answers, and programs that are run.

    benchmark = benchmarks.get("humaneval")
    for problem in benchmark.problems:
        text = benchmarks.cut(continue_text(problem.prompt), benchmark.stops)
        passed, reason, _ = benchmark.verdict(problem, text)

`answers` compares numbers and texts, `execution` runs a program with limits, `benchmarks` knows
problems and how they are judged, `completions` lets a model write.
"""
