"""More words in which the demo's skills are asked; the router knows adapters and base by such prompts (`examples`).

The weights were trained on the skills' own wordings, not on these. A block has one pattern per line; a line that ends
in a backslash goes on in the next. ``[a|b]`` in a pattern stands for either, ``{x}`` for the argument. A pattern that
ends in "." asks as an order, one in "?" as a question: `framed` puts such a sentence into a politer one. What is
`reserved` is never made, even where a pattern stands for it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from random import Random

from loramux.server.demo.reserved import DIGESTS

MORE = {
    "echo": """\
[Repeat|Echo|Copy|Parrot|Mirror back|Recite|Restate|Reproduce] "{x}".
[Write|Type|Print|Output|Say|Display] [exactly|just|only|simply] "{x}".
[Say|Write|Type|Print|Give|Show] "{x}" [again|unchanged|as it is|exactly as written|word for word|verbatim].
[Repeat|Say|Echo|Send|Type] "{x}" [back|back to me|after me|for me|once more].
[Give|Return|Hand|Send] me the [same word|word as it is|very same word]: {x}
[Repeat|Echo|Copy|Say|Print|Write]: {x}
[Repeat|Copy|Echo] what I [say|type|write]: {x}
What [word|text] did I just [say|type|write]: "{x}"?
What does "{x}" look like [unchanged|as it is|left alone]?
Here is a word: "{x}". [Repeat it|Say it back|Type it again|Copy it].
The word is "{x}"; [repeat|echo|copy|print] it.
"{x}": [say it again|repeat it|copy it as it is|echo that].
Make no change to "{x}", just [print|say|write|repeat] it.
Leave "{x}" [alone|as it is] and [write|print|say] it.
Answer with [the word|only|nothing but] "{x}".
Reply with "{x}" [and nothing else|only|unchanged].""",
    "upper": """\
[Write|Type|Print|Put|Spell|Give|Show|Set] "{x}" in [capitals|capital letters|upper case|all caps|big letters|\
block letters|block capitals].
[Turn|Change|Convert|Make|Transform] "{x}" [into|to] [capitals|upper case|uppercase|capital letters|all caps].
[Capitalise|Capitalize|Uppercase|Upcase] [all of|every letter of|each letter in|the whole word] "{x}".
[Shout|Yell|Scream] "{x}" [in capitals|at me|out loud|in writing].
What is "{x}" in [capitals|upper case|uppercase|all caps|capital letters]?
What does "{x}" look like in [capitals|upper case|all caps|big letters]?
How [do|would|does] [you|one|I] write "{x}" in [capitals|upper case|all caps|capital letters]?
In [capitals|all caps|upper case|capital letters], [what is|write|how is] "{x}"?
[Upper case|Uppercase|All caps|Capitals|In capitals|Capital letters]: {x}
"{x}" in [capitals|upper case|all caps|uppercase letters], please.
Make [all letters of|each letter of|every letter in|the letters of] "{x}" [capital|big|upper case|uppercase].
Press caps lock and [type|write] "{x}".
[Give|Show|Send] me "{x}" with [capital letters|every letter big|all letters capitalised].
Replace [small|lower-case|lowercase] letters of "{x}" by capitals.
The word is "{x}"; [uppercase it|write it in capitals|make it all caps].""",
    "first": """\
What is the [first|opening|starting|leading|initial] [letter|character] [of|in] "{x}"?
Which [letter|character] [starts|begins|opens|comes first in|is first in|stands first in|leads] "{x}"?
[Give|Name|Tell|Write|Say|Show|Print|State] [me the|the] [first|opening|starting|initial] [letter|character] of "{x}".
What [letter|character] does "{x}" [begin|start|open] with?
[Which|What] letter is at the [start|beginning|front|head] of "{x}"?
"{x}" [starts|begins|opens] with [which|what] letter?
[First|Initial|Starting|Opening] letter: {x}
[First|Opening|Starting] letter of "{x}"?
With [which|what] letter does "{x}" [begin|start]?
How does "{x}" [begin|start]: with which letter?
The word "{x}" [begins|starts] with what?
[Take|Pick|Find|Get|Extract|Return] the [first|opening|leading] letter of "{x}".
What comes first in "{x}"?
I spell "{x}"; which letter do I [say|write] first?
If I write "{x}", [what|which] letter [comes|is] first?
What is the initial of "{x}"?""",
    "last": """\
What is the [last|final|closing|ending] [letter|character] [of|in] "{x}"?
Which [letter|character] [ends|finishes|closes|comes last in|is last in|stands last in] "{x}"?
[Give|Name|Tell|Write|Say|Show|Print|State] [me the|the] [last|final|closing|ending] [letter|character] of "{x}".
What [letter|character] does "{x}" [end|finish|close|stop] with?
[Which|What] letter is at the [end|very end|tail] of "{x}"?
"{x}" [ends|finishes|closes|stops] with [which|what] letter?
[Last|Final|Ending|Closing] letter: {x}
[Last|Final|Closing] letter of "{x}"?
With [which|what] letter does "{x}" [end|finish|close]?
How does "{x}" [end|finish]: with which letter?
The word "{x}" [ends|finishes] with what?
[Take|Pick|Find|Get|Extract|Return] the [last|final|ending] letter of "{x}".
What comes last in "{x}"?
I spell "{x}"; which letter do I [say|write] last?
If I write "{x}", [what|which] letter [comes|is] last?
In which letter does "{x}" end?""",
    "length": """\
How many [letters|characters] [are in|are there in|make up|has|does it take to write|do you need for|form|\
can you count in] "{x}"?
How many [letters|characters] does "{x}" [have|contain|consist of|hold|use|count]?
[Count|Number|Total|Tally] the [letters|characters] [of|in] "{x}".
How long is "{x}"[| in letters|, counted in letters]?
What is the [length|letter count|number of letters|size in letters] of "{x}"?
[Give|Tell|Name|State|Write|Find|Get] [me the|the] [length|number of letters|letter count|word length] of "{x}".
[Length|Letter count|Number of letters|Letters|Word length]: {x}
[Length|Number of letters] of "{x}"?
"{x}" [has|contains|consists of|is made of] how many letters?
"{x}": how [many letters|long]?
Of how many letters [does|is] "{x}" [made|made up]?
I [spell|write|type] "{x}": how many letters is that?
[Measure|Count] "{x}" in letters.
What do you get if you count the letters of "{x}"?
Say how [long|many letters long] "{x}" is.
The word "{x}" is how many letters long?""",
    "next": """\
[What|Which] number [comes after|follows|is next after|comes next after|succeeds|is right after|directly follows] {x}?
[Give|Name|Tell|Write|Say|Show|State] [me the|the] [number after|next number after|number following|successor of|\
number that follows|number right after] {x}.
What is the [number after|next number after|successor of|number following|next whole number after] {x}?
[Next number|Next|Successor|The number after|After]: {x}
[Count|Go|Move] [one|a step] [up|further|on] from {x}.
What [comes|follows|is] [next|right|directly|straight|just] after {x}?
When counting, what [follows|comes after] {x}?
I [counted to|am at|have reached] {x}; [what is next|what comes next|which number follows]?
[Add|Plus] one [to|onto] {x}.
What is {x} plus one?
Increase {x} by one.
After {x} comes [what|which number]?
{x} + 1 = ?
{x} is followed by [what|which] number?
[Continue|Keep on|Go on] counting: {x}""",
    "reverse": """\
[Reverse|Invert|Flip|Turn around|Mirror|Flip around] "{x}".
[Write|Spell|Type|Print|Say|Give|Show|Read] "{x}" [backwards|backward|in reverse|from back to front|\
from right to left|the other way round|from end to start|in reverse order].
[Reverse|Flip|Invert|Turn round] the [letters|characters|spelling|letter order|order of the letters] [of|in] "{x}".
What is "{x}" [spelled|written|read|typed] [backwards|in reverse|from the end|right to left]?
What [do you get|comes out] when you [reverse|flip|read backwards|turn around] "{x}"?
How [do you spell|do you write|is|would one spell] "{x}" [backwards|in reverse|from back to front]?
[Backwards|Reversed|In reverse|Reverse|Spelled backwards|From back to front]: {x}
[Put|Set|Arrange] the letters of "{x}" in [reverse order|reverse|opposite order|backward order].
"{x}" [backwards|in reverse|reversed|read backwards], please.
[Start|Begin] with the last letter of "{x}" and [end|finish] with the first.
[Turn|Flip|Swing] "{x}" [around|back to front|end to end].
What does "{x}" look like [backwards|in reverse|reversed|in a mirror]?
The word is "{x}"; [reverse it|spell it backwards|write it from the end|flip it around].
Which word is "{x}" [reversed|spelled backwards|backwards]?
If "{x}" [runs|goes] backwards, what does it [say|read]?
Last letter first, [write|spell|give] "{x}".""",
    "double-letters": """\
[Double|Duplicate|Twin|Repeat|Stutter] [every letter|each letter|all letters|all the letters|each character] [of|\
in] "{x}".
[Write|Type|Print|Say|Put|Spell|Give] [every letter|each letter|all letters|each character] of "{x}" [twice|\
two times|double|two times over|in pairs].
[Write|Type|Spell|Print] "{x}" with [every letter doubled|each letter twice|double letters|doubled letters|\
all letters doubled].
What is "{x}" with [every letter doubled|each letter twice|double letters|each letter repeated]?
What [do you get|comes out|results] when you [double|duplicate|repeat] [each|every] letter of "{x}"?
How [does|would] "{x}" look [with doubled letters|with each letter twice|when every letter is doubled]?
[Double letters|Letters doubled|Each letter twice|Doubled|Twice each letter]: {x}
[Stretch|Lengthen|Extend] "{x}" by [writing each letter twice over|doubling each letter|repeating every letter].
[Stutter|Stammer] "{x}"[| letter by letter| for me].
[Make|Let] [each|every] letter of "{x}" [double|appear two times|come in twos].
"{x}" with [every letter|each letter|all its letters] doubled, please.
The word is "{x}"; [double its letters|write each letter twice|double every letter].
Spell "{x}" and say [each|every] letter two times.
Two of [every|each] letter: {x}
For [each|every] letter in "{x}" [write|type|put] two.
Turn each letter of "{x}" into two[| of the same].""",
    "caesar": """\
[Encrypt|Encode|Encipher|Cipher|Code|Scramble] "{x}" [with|using|in|by] [a Caesar cipher|the Caesar cipher|\
a Caesar shift|Caesar code|a shift of one|Caesar's cipher].
[Shift|Move|Advance|Push|Bump] [each|every] letter of "{x}" [by one|one ahead|one forward|one step forward|\
by one place|one place on|up by one|one up].
[Shift|Move|Advance] the letters of "{x}" [by one|one ahead|one forward|one place forward].
[Replace|Swap|Change] [each|every] letter of "{x}" [by|with|for|to] the [next one|next letter|one after it|\
letter after it|following letter].
[Put|Turn|Write|Convert|Change] "{x}" [into|in|to] [secret code|Caesar code|cipher|a secret code|code|Caesar cipher].
[Encrypt|Encipher|Encode|Cipher] [the word|this|my word] "{x}".
What is "{x}" [in Caesar code|encrypted|in cipher|in secret code form|after a Caesar shift|in the Caesar cipher|\
enciphered]?
What [becomes of|happens to] "{x}" when [each|every] letter [moves|shifts] one [ahead|forward|on]?
[Encrypted|Encrypt|Caesar|Caesar code|Secret code|Cipher|Shift by one|Caesar shift]: {x}
How [is|would] "{x}" [written|be written] in [Caesar code|cipher|the Caesar cipher|Caesar's code]?
How would Caesar [write|encrypt|encode|encipher] "{x}"?
[Caesar|Caesar-encrypt|Caesar-shift|Caesar-encode] "{x}".
Make "{x}" [secret|a secret|unreadable] with [a Caesar shift|the Caesar cipher|a one-letter shift].
[Apply|Use] [a Caesar cipher|the Caesar shift|Caesar's cipher|a shift of one] [to|on] "{x}".
The word is "{x}"; [encrypt it|put it in cipher|shift each letter by one|encode it].
Each letter of "{x}" [plus|goes forward by] one, [please|what is it|what comes out].""",
    "roman": """\
[Write|Show|Print|Put|Give|Express|Spell|Note] {x} [in|as|with|using] [Roman numerals|Roman numbers|Roman digits|\
Roman figures|a Roman numeral|Roman style|Roman letters].
[Convert|Change|Turn|Translate|Transform|Rewrite] {x} [to|into|as|in] [Roman numerals|a Roman numeral|Roman numbers|\
Roman digits|Roman].
What is {x} in [Roman numerals|Roman numbers|Roman|Roman digits|Roman notation|the Roman system]?
What is the Roman [numeral|number|form|notation|way to write] [for|of] {x}?
How [would|did|does] [a Roman|the Romans|ancient Romans|an old Roman|Julius Caesar|Rome] [write|note|carve|count|\
mark] {x}?
How [do you|do I|would you|is] [write|written|put] {x} in Roman [numerals|numbers|digits]?
[Roman numeral|Roman numerals|In Roman numerals|Roman|Roman number|As a Roman numeral]: {x}
{x} [in|as|to] [Roman numerals|Roman|Roman numbers|a Roman numeral], please.
{x} in Roman numerals?
[Tell|Give|Show] me the Roman [numeral|number|form|figures] [for|of] {x}.
Which Roman [numeral|number|letters] [is|stands for|stand for|mean|equals] {x}?
[Write|Carve|Chisel|Engrave] {x} [as the Romans did|the Roman way|like a Roman|on a Roman stone|on a Roman clock].
The number is {x}; [write it in Roman numerals|make it Roman|give its Roman numeral].
[Use|With] Roman numerals [to write|for|write] {x}.
Romanise the number {x}.
What did the Romans write for {x}?""",
    "add-ten": """\
[What|How much] is {x} [plus|+|and|increased by|with] [ten|10]?
[Add|Put|Count] [ten|10] [to|on top of|onto] {x}.
[What|How much] is [ten|10] [more than|added to|plus|above|on top of|over] {x}?
[Calculate|Compute|Work out|Evaluate|Solve|Find] {x} [+|plus] [ten|10].
[Give|Tell|Compute|Find|State|Calculate] [me the|the] [sum|total] of {x} and [ten|10].
[What is|What's|Name] the [sum|total] of {x} [and|plus] [ten|10]?
[Increase|Raise|Bump up|Grow|Lift] {x} by [ten|10].
{x} [+|plus] [10|ten] [=|is|equals|makes|gives] [?|what?|how much?]
[10|Ten] [+|plus] {x} = ?
{x} [+|plus] [10|ten]
[What|How much] does {x} [plus|and|+] [ten|10] [make|give|equal|come to|add up to]?
[Give|Name|Tell|Write] [me|us] [the number|a number|what is] [ten|10] [more than|above|higher than] {x}.
What do you get [when|if] you add [ten|10] to {x}?
[I have|You have|Someone has|We have] {x} [apples|coins|points|books]; [ten|10] more [come|are added|\
arrive]. How many [now|is that|in all]?
[Plus ten|Add ten|Plus 10|Ten more|Add 10|+10]: {x}
[Take|Start with|Begin at] {x} and [add|go up by|count on] [ten|10].
The number is {x}; add [ten|10] to it.
Make {x} [ten|10] [larger|bigger|greater|more].
Which number is [ten|10] [more than|larger than|greater than|above] {x}?""",
    "pig-latin": """\
[Say|Write|Speak|Put|Spell|Give|Show|Type] "{x}" in [pig latin|Pig Latin|pig-latin|igpay atinlay].
[Translate|Convert|Turn|Change|Transform|Rewrite|Render] "{x}" [to|into|in] [pig latin|Pig Latin|igpay atinlay|\
pig-latin].
What is "{x}" in [pig latin|Pig Latin|igpay atinlay|pig-latin|the pig latin game]?
What is the [pig latin|Pig Latin] [for|of|word for|form of|version of] "{x}"?
How [do you say|do I say|does one say|would you say|would one write|is] "{x}" in [pig latin|Pig Latin|igpay atinlay]?
[Pig latin|Pig Latin|In pig latin|Igpay atinlay|To pig latin|Pig-latin]: {x}
"{x}" in [pig latin|Pig Latin|igpay atinlay], please.
"{x}" in [pig latin|igpay atinlay]?
[Give|Tell|Show] me the [pig latin|Pig Latin] [for|of|word for|version of] "{x}".
How would [a pig latin speaker|someone speaking pig latin|kids speaking pig latin|a pig latin fan] say "{x}"?
In [pig latin|igpay atinlay], [what is|how do you say|say|write] "{x}"?
[Pig-latinize|Pig latinise|Piglatin] [the word|] "{x}".
The word is "{x}"; [say it in pig latin|turn it into pig latin|make it pig latin|pig latin it].
Make [pig latin|igpay atinlay] [of|out of|from] "{x}".
[Move|Put] the [first consonants|leading consonants|opening consonants] of "{x}" to the end and add "ay".
What does "{x}" [become|sound like|turn into] in [pig latin|Pig Latin]?""",
    "number-words": """\
[Write|Put|Spell|Give|Type|Say|Express|Show] {x} [in words|in English words|as words|in full words|in letters|\
in plain English|with words|using words].
[Spell out|Write out|Spell|Verbalise|Say out loud|Read out|Read aloud] {x}[| in words| in full| in English|\
 in letters].
[Convert|Turn|Change|Translate|Transform] {x} [to|into] [words|English words|written words|its English name|letters|\
text].
What is {x} [in words|in English words|written out|spelled out|in letters|written in full|as words]?
What is the [English name|name in words|written form|English word] [of|for] {x}?
How [do you|do I|would you|does one|would one] [spell|write out|write|say|read|pronounce] {x} [in words|in English|\
in letters|as words]?
How is {x} [spelled|written|spelled out|written out|said|read] [in words|in English|in full|in letters]?
[In words|Words|Spelled out|Written out|In English words|In full|Spell out]: {x}
{x} [in words|spelled out|in English words|written out|as words], please.
{x} in [words|letters]?
[Spell|Write|Put] {x} [as on a cheque|for a cheque|the way it goes on a cheque|as you would on a check].
[Tell|Give] me {x} [in words|in letters|as English words|the way it is spoken|without digits].
[Write|Say|Give] {x} [without digits|without using digits|with letters only|without figures].
The number is {x}; [write it in words|spell it out|say it in English|put it into words].
Which words [name|stand for|say|spell] {x}?
Replace the digits of {x} by words for the [whole|full] number.""",
    "no-vowels": """\
[Remove|Delete|Drop|Strip|Erase|Cut|Take|Kick|Throw|Leave] [the vowels|all vowels|every vowel|all the vowels|\
each vowel] [out of|from|in] "{x}".
[Write|Spell|Type|Print|Give|Say|Show] "{x}" [without vowels|without its vowels|with no vowels|without any vowels|\
minus the vowels|with the vowels removed|in consonants only|with consonants only].
[Keep|Leave|Retain|Give|List|Write|Show|Print] [only the|just the|the] consonants [of|in|from] "{x}".
What is "{x}" [without vowels|without its vowels|with no vowels|minus its vowels|with the vowels left out|\
less its vowels]?
What [is left|remains|stays] [of|from] "{x}" [without vowels|without the vowels|when the vowels go|\
once the vowels are gone|after removing the vowels|if you drop the vowels]?
Which [consonants|letters that are not vowels] [are in|are left in|does one find in|remain in|make up] "{x}"?
[No vowels|Without vowels|Consonants only|Consonants|Vowels removed|Remove vowels|Drop vowels|Vowel-free]: {x}
[Disemvowel|Devowel] "{x}".
"{x}" [without vowels|without its vowels|minus the vowels|with no vowels], please.
How [does|would] "{x}" look [without vowels|without its vowels|with no vowels]?
What are the consonants [of|in] "{x}"?
[Leave|Take] out [a, e, i, o and u|the vowels|every vowel] [of|in|from] "{x}".
The word is "{x}"; [remove its vowels|drop the vowels|keep only the consonants|delete every vowel].
[Shorten|Squeeze|Abbreviate] "{x}" by [dropping|removing|leaving out|deleting] [its vowels|the vowels|all vowels].
[Ban|Skip|Omit] [all vowels|the vowels|vowels] [in|from|when writing] "{x}".
[Make|Get] "{x}" [vowel-free|free of vowels|vowelless].""",
}

ORDER_FRAMES = (
    "Please {order}.",
    "{Order}, please.",
    "Can you {order}?",
    "Could you {order}?",
    "Could you please {order}?",
    "Would you {order} for me?",
    "Will you {order}, please?",
    "Now {order}.",
    "Kindly {order}.",
    "I want you to {order}.",
    "I need you to {order}.",
    "I would like you to {order}.",
    "Try to {order}.",
    "Your task is to {order}.",
    "Your task: {order}",
    "Help me {order}.",
    "Go ahead and {order}.",
    "How about you {order}?",
    "{Order}!",
    "{order}",
    "{Order}. Thanks!",
    "Hello! {Order}.",
    "Hey, {order}.",
    "Quick: {order}.",
    "Here is a task. {Order}.",
)
QUESTION_FRAMES = (
    "{question}?",
    "{Question}, please?",
    "Tell me: {question}?",
    "Can you tell me: {question}?",
    "Please tell me: {question}?",
    "Do you know {question}?",
    "Say, {question}?",
    "Hey, {question}?",
    "Hello! {Question}?",
    "Quick question: {question}?",
    "I wonder: {question}?",
    "I want to know: {question}?",
    "Now, {question}?",
    "{question}",
    "{Question}? Thanks!",
    "Riddle me this: {question}?",
    "So {question}?",
    "For a game: {question}?",
)
NO_ORDERS = frozenset(("The", "Last", "For", "Each", "Two", "I", "My", "Everybody", "With"))
"""First words of sentences that end in "." and are no orders."""
QUOTED, BARE = '"{x}"', "{x}"
QUOTED_STYLES = (BARE, "'{x}'", "\u201c{x}\u201d", 'the word "{x}"', "the word {x}", "*{x}*", "`{x}`")
NUMBER_STYLES = ("the number {x}", '"{x}"')
FRAMED, STYLED = 0.4, 0.3  # shares of the questions
"""Of questions that are asked in a frame, and whose argument is written in another style than the pattern's."""

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_WORDS = re.compile(r"[a-z0-9+*/=-]+")
_NAMED = re.compile(r"\b(the|this|a) (word|number) (?=\W*\{x\})")


def bare(wording: str) -> str:
    """The words of a wording alone: what those share that differ in case, marks, and how the argument is written."""
    return " ".join(_WORDS.findall(_NAMED.sub("", wording.lower()).replace("{x}", " ")))


def is_reserved(wording: str) -> bool:
    """Whether evaluation keeps these words to itself (`reserved`)."""
    return hashlib.blake2b(bare(wording).encode(), digest_size=8).hexdigest() in DIGESTS


def expansions(pattern: str) -> tuple[str, ...]:
    """Every wording that ``pattern`` stands for and that is not reserved."""
    parts = _CHOICE.split(pattern)  # text, choices, text, choices, ..., text
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    found = (_tidy("".join(chosen)) for chosen in itertools.product(*options))
    return tuple(wording for wording in found if not is_reserved(wording))


def framed(wording: str, rng: Random) -> str:
    """``wording`` as part of another sentence, where it is one order or question (else as it is)."""
    if wording[-1] not in ".?" or any(mark in wording for mark in ("please", ". ", "; ", "= ?")):
        return wording
    if (wording[-1] == "." and wording.split()[0] in NO_ORDERS) or wording[0] in '"{':
        return wording
    kind, frames = ("order", ORDER_FRAMES) if wording[-1] == "." else ("question", QUESTION_FRAMES)
    body = wording[:-1]
    starts_small = body if body[0] not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" or body[1:2] == " " else _small(body)
    frame = rng.choice(frames)
    return frame.replace(f"{{{kind}}}", starts_small).replace(f"{{{kind.capitalize()}}}", body)


def restyled(wording: str, rng: Random) -> str:
    """``wording`` with its argument in other quotes, in none, or called a word or a number."""
    if QUOTED in wording:
        style = rng.choice(QUOTED_STYLES)
        return wording.replace(QUOTED, BARE if "word" in wording and "word" in style else style)
    if "number" in wording or wording.startswith(BARE) or ":" in wording:
        return wording
    return wording.replace(BARE, rng.choice(NUMBER_STYLES))


def varied(wording: str, rng: Random) -> str:
    """``wording`` as it is, or in a frame, or with its argument in another style, or both; never what is reserved."""
    while True:
        made = restyled(wording, rng) if rng.random() < STYLED else wording
        made = framed(made, rng) if rng.random() < FRAMED else made
        if not is_reserved(made):
            return made


def _small(text: str) -> str:
    return text[0].lower() + text[1:] if not text.startswith(("Roman", "Caesar", "Pig", "I ")) else text


def _tidy(text: str) -> str:
    return re.sub(r"(?<=\S) {2,}", " ", text)
