"""Judging what a language model wrote: answers, and programs that are run.

    benchmark = benchmarks.humaneval()
    for written in completions.complete(model, params, prompts, max_new_tokens=256):
        ...
    benchmark.judge(problem, text)

`answers` compares texts and numbers, `execution` runs a program with limits, `benchmarks` knows
problems and how they are judged, `completions` lets a model write.
"""
