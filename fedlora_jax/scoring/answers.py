"""Exact match: of the final number of a solution, and of texts."""

import re
from decimal import Decimal

import numpy as np

# With thousands separated by commas, or without; a minus after a letter or digit is an operator. A
# number may begin with a point, but not with one that ends a sentence.
_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
# Without a number behind it, it is a heading of Markdown.
_MARKED = re.compile(rf"####[^\S\n]*[$€£¥]?({_NUMBER.pattern})")


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends in.

    GSM8K's convention (Cobbe et al., "Training Verifiers to Solve Math Word Problems",
    arXiv:2110.14168): the first number right behind a `####`, its commas dropped; spaces and a sign
    of a currency may be between. A text without, of a model that was not taught the mark, is judged
    by its last number, as lm-evaluation-harness's `flexible-extract` does.

    Args:
      text: A reference solution, or what a model wrote.

    Returns:
      None if there is no number.

    Examples:
      >>> final_number('so 2 * 600 = 1,200 dollars.\\n#### 1,200')
      Decimal('1200')
      >>> final_number('In all she pays $18.50.')
      Decimal('18.50')
    """
    # What follows the answer, another invented question for example, does not count.
    found = _MARKED.findall(text)[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(re.sub("[$,]", "", found[0])) if found else None


def same_number(text: str, reference: str) -> bool:
    """Whether two solutions end in the same number; 18, 18.0 and $18 are the same.

    Raises:
      ValueError: If the reference has no number.
    """
    wanted = final_number(reference)
    if wanted is None:
        raise ValueError(f"the reference {reference!r} has no number")
    return final_number(text) == wanted


def same_text(text: str, reference: str) -> bool:
    """Whether two texts are equal but for the white space between words and at the ends."""
    return text.split() == reference.split()


def pass_at_k(samples: int, passed: int, k: int) -> float:
    r"""Estimates without bias how likely one of k programs passes.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    for n programs of which c passed (Chen et al., "Evaluating Large Language Models Trained on
    Code", arXiv:2107.03374, equation 1).

    Args:
      samples: Programs written for a problem, n.
      passed: Those that passed, c.
      k: At most n.

    Raises:
      ValueError: If not `0 <= passed <= samples` and `1 <= k <= samples`.
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {samples} programs of which {passed} passed")
    if samples - passed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))
