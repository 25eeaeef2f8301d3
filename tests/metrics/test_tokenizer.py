"""Words of other languages than English."""

import pytest

from metrics import tokenize
from metrics.tokenizer import find_unsegmented

WITH_MARKS = {  # whose words are whole where they are split at blanks
    "Hindi": "एक कुत्ता हरी घास पर दौड़ रहा है",
    "Bengali": "একটি কুকুর সবুজ ঘাসে দৌড়াচ্ছে",
    "Tamil": "ஒரு நாய் பச்சை புல்லில் ஓடுகிறது",
    "Telugu": "ఒక కుక్క పచ్చని గడ్డిపై పరుగెత్తుతోంది",
    "Malayalam": "ഒരു നായ പച്ച പുല്ലിൽ ഓടുന്നു",
    "Sinhala with a joiner": "ශ්‍රී බල්ලෙක් තණකොළ මත දුවයි",
    "vocalized Arabic": "كَلْبٌ يَجْرِي عَلَى العُشْبِ الأَخْضَرِ",
    "vocalized Hebrew": "יֶלֶד רָץ עַל הַדֶּשֶׁא",
    "Persian": "سگ روی چمن بود و کودک آنجا",
    "Vietnamese": "một con chó đang chạy trên cỏ xanh",
    "decomposed French": "un garc\u0327on joue a\u0300 la plage",
    "Thai, separated": "สุนัข วิ่ง บน หญ้า สี เขียว",
    "Burmese, separated": "ခွေး သည် မြက်ခင်း ပေါ်တွင် ပြေး သည်",
    "Khmer, separated": "ឆ្កែ រត់ លើ ស្មៅ",
    "Tibetan": "ཁྱི་ ཞིག་ རྩྭ་ ཐང་",
    "Divehi": "ކުއްތާ ވިނަ މަތީގައި ދުވަނީ",
    "Syriac": "ܟܰܠܒܳܐ ܪܳܗܶܛ",
    "Chakma": "𑄇𑄪𑄇𑄪𑄢𑄴 𑄙𑄱𑄇𑄴",
}


@pytest.mark.parametrize("language", WITH_MARKS)
def test_marks_stay_with_their_letters(language):
    caption = WITH_MARKS[language]
    expected = [word.removesuffix("་") for word in caption.split()]
    assert tokenize(caption) == expected
    assert tokenize(f"{caption}, {caption}.") == expected * 2


def test_what_follows_symbols_and_emoji_is_no_word():
    assert tokenize("I ❤️ my 👨‍👩‍👧 1️⃣ café 👍🏽 ☝️") == ["i", "❤", "my", "1", "café", "☝"]
    assert tokenize("می\u200cدود") == ["می", "دود"], "as the official tokenizer has it"
    assert tokenize("a dog\u200d and\u200c a cat") == ["a", "dog", "and", "a", "cat"]


def test_case_is_kept_where_asked_for():
    text = "Der Hund’s Straße isn't BIG (USA) U.S. AT&T &amp; Café"
    kept = tokenize(text, lowercase=False)
    assert [word.lower() for word in kept] == tokenize(text)
    assert kept[:2] == ["Der", "Hund"] and {"Straße", "BIG", "-lrb-", "USA", "U.S.", "n't"} <= set(kept)
    assert tokenize(text)[0] == "der", "also after the other call, as results are cached"


UNSEGMENTED = {
    "Chinese or Japanese": ["一只狗在绿色的草地上奔跑。", "犬が緑の草の上を走っている。"],
    "Thai": ["สุนัขวิ่งบนหญ้าสีเขียว"],
    "Lao": ["ໝາແລ່ນຢູ່ເທິງຫຍ້າສີຂຽວ"],
    "Burmese": ["ခွေးသည်မြက်ခင်းပေါ်တွင်ပြေးသည်"],
    "Khmer": ["ឆ្កែកំពុងរត់លើស្មៅបៃតង"],
}
FEW_LONG_WORDS = [
    "スケートボード を する 男 の 子",
    "二人 の 子供 が 雪 の 中 で 遊んで いる",
    "一只 狗 在 草地 上 奔跑",
]


@pytest.mark.parametrize("script", UNSEGMENTED)
def test_sentences_without_blanks_are_found(script):
    for caption in UNSEGMENTED[script]:
        assert len(tokenize(caption)) == 1
        assert find_unsegmented([caption, *["A dog"] * 20]) == (script, [caption])


def test_separated_words_are_none():
    for captions in (
        FEW_LONG_WORDS,
        [*WITH_MARKS.values()],
        ["개가 푸른 잔디 위를 달리고 있다."],
        ["A dog"],
        [],
    ):
        assert find_unsegmented(captions) is None
