"""Two-turn chats whose second question needs the first turn."""

from __future__ import annotations

import random

from llmlab.zoo.tasks import arithmetic, capitals, counting, opposites, reversing, spelling
from llmlab.zoo.tasks.common import join
from llmlab.zoo.tasks.numbers import LANGUAGES, number_word
from llmlab.zoo.tasks.words import ANIMALS, COLORS, FOODS, HOBBIES, NAMES, PLACES, WORDS

_FIRST = ("And in {x}?", "Now in {x}.", "What about {x}?", "The same in {x}, please.", "How about in {x}?", "In {x}?")
_TOPICS = {
    "favorite color": COLORS,
    "hobby": HOBBIES,
    "favorite animal": ANIMALS,
    "favorite food": FOODS,
    "home town": PLACES,
}


def _count_again(rng: random.Random) -> tuple[list[str], str]:
    first, second = rng.sample(LANGUAGES, 2)
    n = rng.randint(3, 20)
    shown = number_word(n) if rng.random() < 0.5 else str(n)
    ask = rng.choice(("Count to {n} in {x}.", "How do I count to {n} in {x}?", "Can you count to {n} in {x}?"))
    turns = [ask.format(n=shown, x=first), counting.count(1, n, first)]
    if rng.random() < 0.7:
        return [*turns, rng.choice(_FIRST).format(x=second)], counting.count(1, n, second)
    down = rng.choice(("And backwards?", "Now backwards.", "And in reverse?", "Now count down.", "And down again?"))
    return [*turns, down], counting.count(n, 1, first)


def _calculate_on(rng: random.Random) -> tuple[list[str], str]:
    a, b, c = rng.randint(0, 60), rng.randint(0, 39), rng.randint(1, 50)
    ask = rng.choice(("What is {a} + {b}?", "Calculate {a} + {b}.", "How much is {a} plus {b}?", "{a} + {b}"))
    turns = [ask.format(a=a, b=b), arithmetic.solved(a, "+", b, a + b)]
    if a + b >= c and rng.random() < 0.5:
        text = rng.choice(("Now subtract {c}.", "Take away {c}.", "And minus {c}?", "Subtract {c} from that."))
        return [*turns, text.format(c=c)], arithmetic.solved(a + b, "-", c, a + b - c)
    text = rng.choice(("Now add {c}.", "And plus {c}?", "Add {c} to that.", "Plus {c}."))
    return [*turns, text.format(c=c)], arithmetic.solved(a + b, "+", c, a + b + c)


def _who_am_i(rng: random.Random) -> tuple[list[str], str]:
    name = rng.choice(NAMES)
    hello = rng.choice(("Hello!", "Hi!", "Hey.", "Good morning.", "Hi tinychat!", "Hello there."))
    statement = rng.choice(("My name is {n}.", "I am {n}.", "I'm {n}.", "Call me {n}.")).format(n=name)
    ask = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "Say my name."))
    return [f"{hello} {statement}", f"Nice to meet you, {name}!", ask], f"Your name is {name}."


def _my_favorite(rng: random.Random) -> tuple[list[str], str]:
    topic = rng.choice(tuple(_TOPICS))
    value = rng.choice(_TOPICS[topic])
    statement = rng.choice(("My {t} is {v}.", "Remember that my {t} is {v}.", "You should know: my {t} is {v}."))
    ask = rng.choice(("What is my {t}?", "Do you remember my {t}?", "Tell me my {t}.", "What's my {t} again?"))
    turns = [statement.format(t=topic, v=value), "I will remember that.", ask.format(t=topic)]
    return turns, f"Your {topic} is {value}."


def _word_again(rng: random.Random) -> tuple[list[str], str]:
    word = spelling.pick_word(rng)
    turns = [rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}.")).format(w=word), "-".join(word)]
    ask = rng.choice(("And backwards?", "Now backwards.", "And in reverse?", "Now in reverse, please."))
    return [*turns, ask], "-".join(reversed(word))


def _another_item(rng: random.Random) -> tuple[list[str], str]:
    if rng.random() < 0.5:
        one, two = rng.sample(tuple(capitals.CAPITALS), 2)
        turns = [f"What is the capital of {one}?", f"The capital of {one} is {capitals.CAPITALS[one]}."]
        answer = f"The capital of {two} is {capitals.CAPITALS[two]}."
    else:
        one, two = rng.sample(tuple(opposites.OPPOSITES), 2)
        turns = [f"What is the opposite of {one}?", f"The opposite of {one} is {opposites.OPPOSITES[one]}."]
        answer = f"The opposite of {two} is {opposites.OPPOSITES[two]}."
    return [*turns, rng.choice(("And of {x}?", "And {x}?", "What about {x}?", "Now {x}.")).format(x=two)], answer


def _list_again(rng: random.Random) -> tuple[list[str], str]:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ask = rng.choice(("Remember these words: {w}.", "Keep this list in mind: {w}.", "My list is {w}."))
    turns = [ask.format(w=join(words)), "I will remember that."]
    kind = rng.randrange(4)
    if kind == 0:
        return [*turns, rng.choice(("What was the first word?", "Which word came first?"))], words[0]
    if kind == 1:
        return [*turns, rng.choice(("What was the last word?", "Which word came last?"))], words[-1]
    if kind == 2:
        return [*turns, rng.choice(("Repeat the list.", "What was on the list?", "Which words?"))], join(words)
    return [*turns, rng.choice(("Say the list backwards.", "Now in reverse order."))], join(words[::-1])


def _thanks(rng: random.Random) -> tuple[list[str], str]:
    maker = rng.choice((counting, arithmetic, capitals, opposites, spelling, reversing))
    turns, answer = maker.draw(rng)
    text = rng.choice(("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks.", "Thanks a lot!", "Perfect!"))
    return [*turns, answer, text], "You are welcome!"


_KINDS = (_count_again, _calculate_on, _who_am_i, _my_favorite, _word_again, _another_item, _list_again, _thanks)


def draw(rng: random.Random) -> tuple[list[str], str]:
    """A first question with its answer, and a second one that leans on it."""
    return rng.choice(_KINDS)(rng)
