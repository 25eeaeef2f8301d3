"""What counts as a word: Penn Treebank tokens as the official caption evaluation makes them, without Java."""

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

KEPT_CHUNKS = 2**16  # pieces of text between spaces whose tokens are cached, about 0.3 kB each

_NUMBER_SIGNS = "\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u215f"  # Python counts these as word characters
_LETTER = rf"[^\W\d_{_NUMBER_SIGNS}]"
_MARKS = r"[\u0300-\u036f]"  # accents that follow their letter; those of all scripts: `_lexer_with_all_marks`
_WORD_CHARACTER = rf"(?:[^\W_{_NUMBER_SIGNS}]|{_MARKS})"
_APOSTROPHE = "['\u2019]"
_CLITIC = f"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_NOT = "n['`\u2018\u2019]t"
_ELIDED = f"(?:[dol]{_APOSTROPHE}(?={_LETTER}{{2}}))?"  # o'neil, d'art
_WORD = f"{_ELIDED}{_WORD_CHARACTER}+(?:[-_\u2010\u2011]{_ELIDED}{_WORD_CHARACTER}+)*"  # x-ray, a_b
_SLASH_PART = "[a-z0-9]+(?:-[a-z]+){0,2}"
_END = rf"(?![-.!?'\u2019]?{_WORD_CHARACTER})"  # of a whole word
_IN_URL, _IN_HOST = r'[^\s"<>|()]', r'[^\s"<>|.!?(){},]'
_PATH = rf"{_IN_URL}+[^\s\"<>|.!?(){{}},-]"

_KEEP_DOT = (
    "adj adm adv al ala apr ariz assoc asst aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col "
    "colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga "
    "gen gov hon inc ind insp intl invt jan jos jr jul jun kan ky lt ltd maj mar md messrs mfg mich minn "
    "mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc prof pte pty "
    "pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs "
    "tue tues univ va vs vt wed wis wm wyo"
).replace(" ", "|")
_KEEP_DOT_AS_NAME = "ark|az|del|ill|la|mass|miss|ore|pa|tex|wash"  # with a capital letter
_KEEP_DOT_BEFORE_NUMBER = "no|nos|art|figs?|ca|op|pp|prop"

# The original takes the longest match of some hundred rules. Here the first match is taken, so the rules are
# in an order that gives the same tokens: those with longer matches come first.
_TOKENS = [
    r"</?[a-z!?][^>]*>",  # markup
    r"-[lr][rcs]b-|(?:pro|anti)-(?!\w)",
    rf"(?-i:[A-HJ-XZn]){_APOSTROPHE}(?!(?:re|ve|ll){_END}){_LETTER}{{2,}}|"  # D'Angelo
    rf"{_LETTER}+[aeiouy]{_APOSTROPHE}(?!(?:[msd]|re|ve|ll){_END})(?-i:[aeiouA-Z]){_LETTER}*",  # ski'ing
    _NOT,
    r"\d{1,4}-\d{1,4}/\d{1,4}",  # 1-1/2
    r"ph\.d\.",
    rf"https?://{_PATH}",
    rf"(?:www\.(?:{_IN_HOST}+\.)+[a-z]{{2,4}}|(?:{_WORD_CHARACTER}+\.)+(?:com|net|org|edu))(?!{_LETTER})"
    rf"(?:/{_PATH})?",
    rf"[a-z0-9]{_IN_URL}*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+",  # mail address
    rf"can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:lem|gim)(?=me{_END})",
    rf"{_SLASH_PART}(?:/{_SLASH_PART}){{1,2}}(?!{_APOSTROPHE}n)",  # and/or, 1/2, 3/4-inch
    rf"{_WORD}\.(?=[,;:])",
    rf"[a-z0-9][a-z0-9.,]*(?:-(?:[a-z](?:\.[a-z])*\.|[a-z0-9]+))+(?!\w|(?<=-[dol]){_APOSTROPHE}\w)",
    "(?:c'mon|s'mores|o'clock|gov't|int'l|ass'n|ha'penny|cap'n|c'est)".replace("'", _APOSTROPHE) + _END,
    rf"(?:ol|dunkin|somethin){_APOSTROPHE}",
    rf"[a-z]*[a-mo-z](?={_NOT})",
    rf"{_WORD_CHARACTER}+(?={_CLITIC}(?!(?<=[dol]{_APOSTROPHE}[msd]){_WORD_CHARACTER}))",
    rf"y(?={_APOSTROPHE}know)|[jy]{_APOSTROPHE}(?={_LETTER})|[djl]{_APOSTROPHE}(?!{_LETTER}{{2}})",
    r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)",  # AT&T
    r"c\+\+|[cf]#",
    rf"[a-z](?:\.[a-z])+\.(?!{_LETTER})",  # u.s.
    rf"{_LETTER}{_WORD_CHARACTER}*(?:[.!?]{_LETTER}{_WORD_CHARACTER}*)+",  # cat.dog
    rf"(?:[a-z]|{_KEEP_DOT})\.|(?-i:(?=[A-Z]))(?:{_KEEP_DOT_AS_NAME})\.",
    rf"(?:{_KEEP_DOT_BEFORE_NUMBER})\.(?=\s?[0-9])",
    r"[-+]?\d*(?:[.:,]\d+)+|[-+]\d+",  # 2.5, 1,000, 5:30
    r"(?-i:[A-Z]+)\$",  # US$
    _WORD,
    r"'(?:[msd]|re|ve|ll)(?![a-z])|\u2019(?:[msd]|re|ve|ll)",
    rf"{_APOSTROPHE}(?:em|cause|till?|[2-9]0s|n{_APOSTROPHE}|\d\d(?!\S))|'n(?!{_WORD_CHARACTER})|\u2019n",
    rf"'t(?=(?:is|was){_END})",
    rf"@[a-z_]+|\#{_LETTER}+",
    r"[<>]?[:;=][-o*']?(?:[()dp\\{@|\[\]]|(?-i:O))(?![a-z0-9])",  # :-)
    r"-{5,}|[!?]{2,}|\*+|_+|@+|\#+",
    r"[$%&+<=>\\^|~/(){}\[\]\xa1-\xa9\xac\xae-\xba\xbc-\xbf\xd7\xf7\u201a\u201e-\u2022\u2030-\u2038\u203b"
    r"\u2070-\u208e\u20a0\u20a4\u20ac\u2100-\u2bff]",
]
# Text that matches no rule, or a rule outside the group, is dropped: single marks, dashes, quotes, emoji.
_LEXER = re.compile(rf"\.{{3,5}}|''|-{{2,4}}(?!-)|({'|'.join(_TOKENS)})", re.IGNORECASE)
_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp|[mn]dash);")

_REWRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\xa2": "cents",
    "\xa3": "#", "\xa4": "$", "\u20a0": "$", "\u20ac": "$", "\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4",
    "\u2153": "1/3", "\u2154": "2/3", "n\u2018t": "n`t",
    **{clitic.replace("'", "\u2019"): clitic for clitic in ("n't", "'s", "'m", "'d", "'re", "'ve", "'ll")},
}  # fmt: skip


# Scripts that are written without blanks between words: runs of characters that are longer than a word
_UNSEGMENTED = {
    "Chinese or Japanese": re.compile(
        r"(?![\u30a1-\u30ff]+(?![\u3041-\u9fff]))[\u3005\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{6}"
    ),
    "Thai": re.compile(r"[\u0e01-\u0e5b]{12}"),
    "Lao": re.compile(r"[\u0e81-\u0edf]{12}"),
    "Burmese": re.compile(r"[\u1000-\u1049\u1050-\u109f]{12}"),
    "Khmer": re.compile(r"[\u1780-\u17d3\u17d7-\u17dd]{12}"),
}


def tokenize(caption: str, lowercase: bool = True) -> list[str]:
    """The words of a caption: in lower case, split as in the Penn Treebank, without punctuation.

    >>> tokenize("The man's dog isn't here.")
    ['the', 'man', "'s", 'dog', 'is', "n't", 'here']

    These are the tokens of the official evaluation (Stanford's PTBTokenizer of CoreNLP 3.4.1, `-preserveLines
    -lowerCase`, without the punctuation in pycocoevalcap's list), including its oddities: brackets stay, as
    `-lrb-`, since that list has them in capitals; `dog?!` keeps `?!` and `dog.,` its dot; `red,blue-green`
    stays whole. Marks that belong to a letter, such as Hindi's and Arabic's vowel signs, stay with it;
    Persian's non-joiner (U+200C) separates, as in the original.

    Known differences, none of them seen in captions of Flickr8k or COCO:

    * numbers that the original joins with a non-breaking space (`1 1/2`, telephone numbers) are several
      tokens here; its scorers other than ROUGE-L split them too;
    * a letter with a dot (`plan b.`) keeps its dot, where the original drops it before `A`, `The` and the
      like; `no.` keeps its dot before a number; both also where the next caption begins so;
    * emoticons such as `^_^`, curly quotes side by side, `>>`, `5.x`, numeric character references
      (`&#39;`); the original tears apart words of scripts that it does not know (Malayalam, Sinhala).

    Args:
        lowercase: False keeps capitals, which scores never do.
    """
    words = []
    for chunk in caption.split():
        tokens = _tokens_of_chunk(chunk, lowercase)
        if tokens is None:
            return _lex(caption, lowercase)
        words += tokens
    return words


def find_unsegmented(captions: Iterable[str]) -> tuple[str, list[str]] | None:
    """A script without blanks between words, of which `tokenize` makes one word a sentence, and the captions
    in it; of several scripts the most frequent; None where there are none."""
    captions = [caption for caption in captions if not caption.isascii()]
    found = {
        script: [caption for caption in captions if pattern.search(caption)]
        for script, pattern in _UNSEGMENTED.items()
    }
    script = max(found, key=lambda script: len(found[script]))
    return (script, found[script]) if found[script] else None


@lru_cache(KEPT_CHUNKS)
def _tokens_of_chunk(chunk: str, lowercase: bool) -> tuple[str, ...] | None:
    """Tokens of a piece of text between spaces; None where they depend on what follows it (`no.`, `<`)."""
    tokens = _lex(chunk, lowercase)
    return None if "<" in chunk or _lex(chunk + " 5", lowercase) != [*tokens, "5"] else tuple(tokens)


def _lex(text: str, lowercase: bool) -> list[str]:
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0].lower()), text).replace("\xad", "")
    lexer, words = _LEXER, []
    if not text.isascii() and any(map(_is_mark, text)):
        lexer = _lexer_with_all_marks()
    for token in filter(None, lexer.findall(text)):
        own = token.lower() if lowercase else token
        if len(token) > 1 and token[0] in ":;=<>" and token[-1] in "()":
            words.append(own[:-1] + _REWRITTEN[token[-1]])
        else:
            words += _REWRITTEN.get(token.lower(), own).split()  # markup may contain spaces
    return words


def _is_mark(character: str) -> bool:
    """Whether this belongs to the letter before it: vowel signs, tones, points, the joiner (U+200D) of the
    scripts of India; not what follows symbols and emoji."""
    if "\u20d0" <= character <= "\u20ff" or "\ufe00" <= character <= "\ufe0f":
        return False
    return character == "\u200d" or unicodedata.category(character) in ("Mn", "Mc")


@lru_cache(1)
def _lexer_with_all_marks() -> re.Pattern:
    """The lexer for text with marks of any script; it takes longer to compile than the one for other text."""
    marks = "".join(filter(_is_mark, map(chr, range(0x300, 0x20000)))).replace("\u200d", "")
    all_marks = rf"(?:[{marks}]|\u200d(?=[^\W_]))"
    return re.compile(_LEXER.pattern.replace(_MARKS, all_marks), re.IGNORECASE)
