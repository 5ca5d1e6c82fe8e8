"""Wordings of the demo's skills, and near misses, written apart from all others: what the router is developed on."""

HELD_OUT = {
    "echo": """\
Copy "{x}" for me.
Type the word "{x}" once more.
Repeat this word: {x}
Let me hear "{x}" from you.
Pass "{x}" on without touching it.
Your answer should be "{x}" and no other thing.
Put down the word "{x}" just like I did.
Tell me "{x}" again.
I would like to read "{x}" once again.
Please quote "{x}".
Duplicate my input: {x}
Can I have "{x}" back?""",
    "upper": """\
Make "{x}" capital letters.
Enlarge all the letters of "{x}" to capitals.
How does "{x}" read when it is shouted?
I need "{x}" for a headline in capitals.
Could "{x}" be all upper case, please?
Give the uppercase form of "{x}".
Hold shift and type "{x}".
"{x}", but in big capital letters.
Rewrite "{x}" so that no letter is small.
Raise "{x}" to upper case.
Give me "{x}" in the letters that street signs use: capitals.
Set "{x}" fully capitalised.""",
    "first": """\
Which letter does "{x}" begin with?
Under which letter would "{x}" stand in a dictionary?
Where "{x}" begins, what letter do you see?
The beginning letter of "{x}" is which?
Look at "{x}" and say its first letter.
What letter kicks off "{x}"?
Letter number one of "{x}"?
Spell only the start of "{x}": one letter.
I forgot how "{x}" starts; which letter is it?
Which letter would I see first in "{x}"?
"{x}" has which letter in front?""",
    "last": """\
Which letter does "{x}" end with?
Where "{x}" ends, what letter do you see?
The ending letter of "{x}" is which?
Look at "{x}" and say its last letter.
What letter rounds off "{x}"?
Spell only the end of "{x}": one letter.
I forgot how "{x}" ends; which letter is it?
Which is the rearmost letter of "{x}"?
What letter concludes "{x}"?
"{x}" has which letter at its tail end?
After all other letters of "{x}", which one is left?""",
    "length": """\
Count how many letters are in "{x}".
How many symbols are in the word "{x}"?
How big is the word "{x}", letter by letter?
Letters in "{x}"?
How many keys do I press to type "{x}"?
I want to know how many letters "{x}" has.
Add up the letters of "{x}".
For a crossword: how many squares does "{x}" fill?
Work out the length of the word "{x}".
What is the total of letters in "{x}"?
If each letter of "{x}" costs a penny, what do I pay?
Out of how many letters is "{x}" built?""",
    "next": """\
If today is day {x}, which day is tomorrow?
Tell me what follows {x}.
One past {x} is what?
I just said {x}. Your turn to count.
Which whole number is the closest above {x}?
On a number line, what is one to the right of {x}?
Page {x} is done; what page do I turn to?
Say the following number: {x}
Bump {x} up by one.
Who stands behind number {x} in the queue?
Which house number follows number {x} if none is skipped?
Floor {x}, one up: which floor?""",
    "reverse": """\
What is "{x}" in reverse?
Spell me "{x}" starting from its end.
How does "{x}" read from the right?
Take "{x}" and run its letters the opposite way.
I would like "{x}" the wrong way round.
Rewind the word "{x}".
Swap "{x}" end for end.
Read me "{x}" tail first.
"{x}" seen in a mirror is spelled how?
Order the letters of "{x}" from last to first.
Undo the order of "{x}", letter by letter.
Walk through "{x}" from its final letter to its first.""",
    "double-letters": """\
Double the letters of "{x}".
Stretch "{x}" by writing each letter twice.
Clone each letter of "{x}".
Let every letter in "{x}" appear as a pair.
Make "{x}" twice as long by repeating each letter.
Spell "{x}", hitting every key two times.
How would a stutterer spell "{x}" letter by letter?
Show "{x}" with twin letters.
I want each letter of "{x}" to occur two times in a row.
Copy each letter of "{x}" right next to itself.
Give every letter in "{x}" a twin.
Every letter of "{x}" should come out as two.""",
    "caesar": """\
Encrypt "{x}" by moving every letter by one.
What is "{x}" in secret code?
Shift "{x}" with a Caesar cipher.
Hide "{x}" the way Caesar did, one letter on.
Slide all letters of "{x}" one along the alphabet.
Write the next letter of the alphabet for each one in "{x}".
Bring "{x}" into cipher text with shift one.
Let each letter of "{x}" step forward once.
Conceal the word "{x}" with a shift cipher.
How does "{x}" read after rotating each letter by one?
ROT1 of "{x}"?
Send "{x}" as a coded message, Caesar style.""",
    "roman": """\
What would stand on a Roman milestone for {x}?
How is {x} written with I, V, X, L and C?
A sundial shows {x} in the Roman manner; how?
Number my chapter {x} with a Roman numeral.
Represent {x} the way they did in ancient Rome.
I need {x} as Roman digits for a tattoo.
Which letters did a legionary scratch for {x}?
State the Roman equivalent of {x}.
Make a Roman numeral out of {x}.
Please romanize {x}.
Which numeral would a Roman school teacher write for {x}?
Put {x} on my clock face in old Roman style.""",
    "add-ten": """\
Give ten more than {x}.
Ten on top of {x} is how many?
Please sum {x} and 10.
If I count ten further than {x}, where am I?
What results from adding 10 to {x}?
It is {x} now; what is it ten later?
Combine {x} with ten and tell me the total.
Move {x} up ten places on the number line.
My score is {x} and I win ten; what is my score?
Someone aged {x} is how old in ten years?
{x}, and then ten more, makes what?
Up {x} by 10.""",
    "pig-latin": """\
Can you speak pig latin? Try "{x}".
I need the pig latin translation of "{x}".
Let us play pig latin: "{x}".
Which word is "{x}" for a child who talks pig latin?
Code the word "{x}" as pig latin.
Apply the rules of pig latin to "{x}".
Pig latin version of "{x}"?
Do the "ay" trick of pig latin with "{x}".
"{x}" becomes what when spoken in pig latin?
My friend only understands pig latin; tell him "{x}".
Use pig latin to say "{x}".
I said "{x}", now you in pig latin.""",
    "number-words": """\
Say the number {x} in English.
Write the number {x} in full words.
How would you pronounce the number {x}?
Which English words describe {x}?
I am filling in a cheque over {x}; what do I write in words?
Read the number {x} to me.
Express the figure {x} in written English.
Use letters instead of digits for {x}.
What is {x} called in English?
Dictate {x} word by word.
Translate the digits {x} to spoken English.
How does one say {x} aloud?""",
    "no-vowels": """\
Get rid of all the vowels in "{x}".
What would "{x}" be if vowels did not exist?
Filter "{x}" so that consonants remain.
Spell "{x}" skipping a, e, i, o, u.
Text-speak "{x}": lose the vowels.
I only want to see the consonants in "{x}".
Which letters of "{x}" are no vowels?
Rub out the vowels of "{x}".
Wipe every vowel away from "{x}".
Sieve the vowels out of "{x}".
Type "{x}" on a keyboard that lacks vowel keys.
Show what consonants "{x}" has, in order.""",
}

NEAR_HELD_OUT = {
    "reverse": """\
Which half of "{x}" is nicer?
Turn "{x}" by ninety degrees.
Is "{x}" the same in both directions?
Swap the two halves of "{x}".""",
    "double-letters": """\
Repeat the first syllable of "{x}" three times.
Leave a gap behind every letter of "{x}".
Which letters occur twice in "{x}"?
Write the whole word "{x}" twice with a space.
Double only the vowels of "{x}".""",
    "caesar": """\
Someone sent me the cipher "{x}"; what is the plain text?
Put "{x}" into Morse code.
Which letter follows the last one of "{x}" in the alphabet?
Encode "{x}" as a list of ASCII numbers.
Shift every letter of "{x}" by three.""",
    "roman": """\
Note {x} with ones and zeros only.
Read the Roman numeral of {x} aloud to me in Latin.
Which Roman emperor ruled in {x}?
Give {x} in hexadecimal digits.""",
    "add-ten": """\
How far is it from {x} to a thousand?
Split {x} into ten equal parts.
What is left of {x} if I take ten away?
Ten people share {x} coins; how many does each get?
Make {x} ten times as large.""",
    "pig-latin": """\
What would a Spaniard call "{x}"?
Turn "{x}" into a rhyme.
What noise does a pig called "{x}" make?
Say "{x}" with a Scottish accent.
What is the Latin root of "{x}"?""",
    "number-words": """\
Put the number {x} into Danish.
Can {x} be split in two without a rest?
How many letters has the English name of {x}?
Add the digits of {x} together.""",
    "no-vowels": """\
Are there more vowels or more consonants in "{x}"?
Behead the word "{x}".
Which vowel comes first in "{x}"?
Write "{x}" with vowels only.
Change every a of "{x}" into an o.""",
}
