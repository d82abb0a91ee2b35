"""What the report says around its tables."""

HEAD = """# Evidence on language

Written by `python experiments/language/report.py` from `experiments/language/results.jsonl`; every
table is made of the runs that are there, and what is missing is listed at the end.

    python experiments/language/prepare.py --data DATA      # text and benchmarks to two small files
    python experiments/language/run.py                      # every run that is missing
    python experiments/language/run.py --arm nirvana --seed 0 --setting A

Figures stand with a 95 % interval in brackets: the runs (seeds) and the documents or questions are
drawn with replacement, {resamples:,} times; where an arm has one run, documents alone are drawn,
and the interval says nothing of another seed. Differences are between runs of the same seed on the
same documents, drawn alike. With three seeds and few documents (novels: 10) such intervals are too
narrow rather than too wide.
"""

SETUP = """
## What was trained

Size {size}: D {model[hidden_size]}, {model[num_hidden_layers]} layers, \
{model[num_attention_heads]} heads, window {model[sliding_window]}, C {model[task_dim]}, \
R {model[bank_size]}, vocabulary {model[vocab_size]}. Every run: {tokens:,} tokens in {steps:,}
steps of {rows} rows of {context} tokens, documents packed with the state reset between them; AdamW,
learning rate {lr:g} after {warmup:.0%} of warm-up down to a tenth by a cosine, the same for all
arms and not tuned for any. Rows of all domains in equal shares; a seed gives all arms the same rows
in the same order. The tokenizer is the packaged one, which has seen the training text of all five
domains.

Setting A trains on general, novels, biomed, law and finance, setting B on general and novels alone;
both are scored on test text of all five. Bits per byte are of the first {context} tokens of every
document, from a fresh state, each token before it is read. All arms have the parameters of the
first within 2 %: SwiGLU's width makes up for what an arm has or lacks.
"""

POSITIONS = """
### Setting {setting}, by position in the document

Bits per byte, mean over domains.
"""

RECALL = """
### Setting {setting}, recall

Share of answers that greedy decoding writes.
"""

NEXT_TO_NONE = 0.01
NO_RECALL = """
Next to none: in no task, at no length and by no arm are more than {most:.1%} right, the upper ends
of the intervals included.
"""

BITS = """
Bits that an answer costs: they tell models apart before any answer is right.
"""

TASKS = """
### Setting {setting}, benchmarks

Accuracy without examples, of the first questions of each set; LAMBADA: the last word by greedy
decoding. A model of this size answers multiple choice by chance or by surface: {above} of
{compared} intervals lie above chance.
"""

ABLATIONS = """
## Ablations and variants

Bits per byte minus `{reference}`; below zero the variant is better. A variant may be chosen by the
validation text only; test text then says what it is worth.
"""

CANDIDATES = """
## The packaged model

`tiny` (5.8 M parameters, configuration `tiny`: step size and decay of the Trigger learned) beside
other recipes that were trained on as many tokens: bits per byte of the whole validation
files, every document from a fresh state; documents alone are drawn. The one with the lower mean
ships.
"""

COST = """
## Time and memory

Of training, without compilation: the median run (smallest to largest), whatever its budget of
tokens. Processes that share a device slow each other down: rows with more than one of them say
nothing of a model alone.
"""

INSIDE = """
Curves: mean over the longest documents of each test set, first run, bars of two standard errors. t
is the share of the window branch; the step is the length of what the Trigger adds to its fast
parameters.

Does the domain stand in them? A linear probe (ridge) reads pieces of 512 tokens from a fresh state,
trained on every second document and asked about the others; of five domains, the rarest classes
weigh as much as the others. "fast": mean of the fast parameters behind the last layer; "gates":
mean gate of each layer; "embedded": mean of the token embeddings, what any bag of words would know.
"always one" is the share of the largest domain, which needs no features at all.
"""
