"""LongBench's metrics: scores in [0, 1] of one prediction against one reference.

They reproduce everything in the benchmark that changes a score. Each oddity is named where it is.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]  # prediction, reference, all classes (classification only)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles (SQuAD's normalisation)."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the harmonic mean of precision and recall of the normalised words, as multisets."""
    predicted, expected = normalize(prediction), normalize(reference)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L F1 at summary level, as the `rouge` package computes it by default.

    Sentences end at every full stop. Words count if they are in the longest common subsequence of
    any reference sentence with any predicted sentence. The distinct words that count, over the
    distinct words of the prediction (of the reference), are the precision (the recall). The package
    fails on very long sentences without a full stop, which the benchmark scores 0. Here they are
    scored.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    found: set[str] = set()
    for sentence in expected:
        for other in predicted:
            found.update(common_subsequence(sentence, other))
    precision = len(found) / len({word for sentence in predicted for word in sentence})
    recall = len(found) / len({word for sentence in expected for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return 1 over the number of class names in the prediction, if the right one is among them.

    Class names that are part of the right one's are not counted. As in the benchmark, names are
    removed from the list while it is iterated, so the name after a removed one stays.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            del named[place]
        place += 1
    return 1 / len(named) if reference in named else 0.0


def count_share(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the prediction's numbers that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def paragraph_share(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return `count_share` for the number in a reference like `Paragraph 12`."""
    paragraph = re.search(r"Paragraph (\d+)", reference)
    return count_share(prediction, paragraph[1]) if paragraph else 0.0


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Return the similarity of the prediction's first line without a comment or a fence.

    The ratio is fuzzywuzzy's over python-Levenshtein, as RepoBench-P requires it, in whole per
    cent. Without that package, fuzzywuzzy falls back to difflib, which scores lower: published
    scores can differ for this reason alone.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * indel_ratio(code, reference)) / 100


def indel_ratio(one: str, other: str) -> float:
    """Return 1 minus the insertions and deletions between two texts, over both lengths."""
    if not one and not other:
        return 1.0
    return 2 * _lengths_of_common_subsequences(one, other)[-1][-1] / (len(one) + len(other))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return a longest common subsequence. Of several, it is the one that `rouge` takes."""
    lengths = _lengths_of_common_subsequences(one, other)
    common: list[str] = []
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            common.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def _lengths_of_common_subsequences(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Return the table [len(one) + 1][len(other) + 1] over all pairs of prefixes."""
    lengths = [[0] * (len(other) + 1)]
    for item in one:
        above, row = lengths[-1], [0]
        for j, counterpart in enumerate(other):
            row.append(above[j] + 1 if item == counterpart else max(above[j + 1], row[j]))
        lengths.append(row)
    return lengths


def _sentences(text: str) -> list[list[str]]:
    """Return the words of each part between full stops.

    A blank part is one empty word, as in the `rouge` package.
    """
    return [part.split() or [""] for part in text.split(".") if part]
