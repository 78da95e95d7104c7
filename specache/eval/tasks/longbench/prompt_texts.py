"""LongBench's 16 English tasks: prompt template, longest answer and metric of each.

Source: Bai et al. 2023, "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding". Scores depend on the templates, so these are the benchmark's to the letter,
including a missing space in `narrativeqa`.
"""

from __future__ import annotations

from dataclasses import dataclass

from specache.eval.tasks.longbench.metrics import (
    Metric,
    classification,
    code_similarity,
    count_share,
    paragraph_share,
    qa_f1,
    rouge_l,
)


@dataclass(frozen=True)
class Subset:
    """One task of the benchmark.

    Attributes:
        prompt: with `{context}` and `{input}`.
        max_new_tokens: longest answer.
        metric: score in [0, 1] of a prediction against one reference.
        chat: whether it is asked as a user's message. The benchmark found that few-shot and code
            tasks score better without.
        first_line: only the first line of the prediction counts.
        one_line: decoding ends at a line break, and the answer has at least one token.
    """

    prompt: str
    max_new_tokens: int
    metric: Metric
    chat: bool = True
    first_line: bool = False
    one_line: bool = False


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)

SUBSETS: dict[str, Subset] = {
    "narrativeqa": Subset(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as "
        "you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the "
        "question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Question: {input}\n\nAnswer:",
        128,
        qa_f1,
    ),
    "qasper": Subset(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or "
        'sentence if possible. If the question cannot be answered based on the information in the article, write "unanswerable". '
        'If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
        "Article: {context}\n\n Answer the question based on the above article as concisely as you can, using a single phrase or "
        'sentence if possible. If the question cannot be answered based on the information in the article, write "unanswerable". '
        'If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
        "Question: {input}\n\nAnswer:",
        128,
        qa_f1,
    ),
    "multifieldqa_en": Subset(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, "
        "only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        qa_f1,
    ),
    "hotpotqa": Subset(_PASSAGES, 32, qa_f1),
    "2wikimqa": Subset(_PASSAGES, 32, qa_f1),
    "musique": Subset(_PASSAGES, 32, qa_f1),
    "gov_report": Subset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:",
        512,
        rouge_l,
    ),
    "qmsum": Subset(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more "
        "sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: {input}\nAnswer:",
        512,
        rouge_l,
    ),
    "multi_news": Subset(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
        512,
        rouge_l,
    ),
    "trec": Subset(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        classification,
        chat=False,
        first_line=True,
    ),
    "triviaqa": Subset(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following "
        "are some examples.\n\n{context}\n\n{input}",
        32,
        qa_f1,
        chat=False,
        first_line=True,
    ),
    "samsum": Subset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        rouge_l,
        chat=False,
        first_line=True,
        one_line=True,
    ),
    "passage_count": Subset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these "
        "paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many "
        "non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after "
        "removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\n"
        "The final answer is: ",
        32,
        count_share,
    ),
    "passage_retrieval_en": Subset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n"
        "{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        paragraph_share,
    ),
    "lcc": Subset("Please complete the code given below. \n{context}Next line of code:\n", 64, code_similarity, chat=False),
    "repobench-p": Subset(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, code_similarity, chat=False
    ),
}
