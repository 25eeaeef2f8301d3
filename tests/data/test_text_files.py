"""Text files in any encoding: read right, and written back byte for byte."""

import random

import pytest

from captioning.data.text_files import decode_text, encode_text, read_text
from utils import UserError

TEXTS = {
    "utf-8": "Café – schön 東京 ☂",
    "utf-8-sig": "a dog",
    "utf-16-le-sig": "Café – schön",
    "utf-16-be-sig": "девочка",
    "utf-32-le-sig": "a dog",
    "utf-16-le": "a dog on grass",
    "utf-16-be": "Café – schön, 東京\r\n",
    "utf-32-be": "a dog",
    "cp1252": "it’s „Café“ – schön",
}


@pytest.mark.parametrize("codec", TEXTS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_what_is_recognized(codec, end):
    text = TEXTS[codec] + end
    data = encode_text(text, codec)
    assert decode_text(data, "file") == (text, codec)


@pytest.mark.parametrize(
    "codec, text",
    [
        ("cp932", "赤い帽子の女の子が公園で犬と遊んでいる"),
        ("gb18030", "一个戴红帽子的女孩在公园里和狗玩, 照片"),
        ("euc_kr", "빨간 모자를 쓴 소녀가 공원에서 개와 놀고 있다"),
        ("cp1251", "Девочка в красной шляпе играет с собакой в парке у реки летом"),
        ("cp1250", "Dívka v červeném klobouku běží po louce a směje se na slunce"),
        ("cp1253", "Ένα κορίτσι με κόκκινο καπέλο παίζει στο πάρκο"),
    ],
)
def test_older_encodings_of_a_sentence(codec, text):
    found, name = decode_text(text.encode(codec), "file")
    assert found == text and encode_text(found, name) == text.encode(codec)


def test_short_texts_in_any_older_encoding_take_ascii_words_without_harm():
    """Of a word or two the encoding can often not be told; what is added in ASCII is right all the same."""
    rng, refused = random.Random(0), 0
    letters = {
        "cp1252": "àéîõüßñç’–",
        "cp1251": "девочкавкраснойшляпе",
        "koi8-r": "девочкавкраснойшляпе",
        "cp1255": "ילדהעםכובעאדום",
        "cp932": "赤い帽子の女の子が公園で犬と遊ぶ",
        "euc_jp": "赤い帽子の女の子が公園で犬と遊ぶ",
        "gb18030": "一个戴红帽子的女孩在公园里和狗玩",
        "big5": "一個戴紅帽子的女孩在公園裡和狗玩",
        "euc_kr": "빨간모자를쓴소녀가공원에서개와",
        "mac_roman": "éüñç",
    }
    for codec, alphabet in letters.items():
        for _ in range(60):
            words = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
            text = rng.choice([" ", ", ", ""]).join(words)
            data = text.encode(codec)
            try:
                found, name = decode_text(data, "file")
            except UserError:
                refused += 1
                continue
            added = encode_text(found + ", a dog", name)
            assert added == data + b", a dog", (codec, text, name)
    assert refused < 6  # of 600


def test_utf16_without_a_mark_or_a_single_ascii_character():
    for text in ("赤い帽子の女の子が公園で", "一个戴红帽子的女孩在公园里", "девочка"):
        for codec in ("utf-16-le", "utf-16-be"):
            assert decode_text(text.encode(codec), "file") == (text, codec)


@pytest.mark.parametrize(
    "data, part",
    [
        (b"a\0b", "not a text file (byte 1, in line 1, is a control character)"),
        (bytes(20), "not a text file"),
        (random.Random(0).randbytes(500), "not a text file"),
        (b"\xff\xfea", "begins as UTF-16-LE"),
        (b"\xef\xbb\xbf\xff", "begins as UTF-8"),
        ("é è ü ß".encode() + b" \xff", "damaged UTF-8 text (at byte 12, in line 1)"),
    ],
)
def test_what_is_no_text_is_named(data, part):
    with pytest.raises(UserError, match=r"^notes\.txt: ") as error:
        decode_text(data, "notes.txt")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_a_character_that_the_encoding_lacks():
    with pytest.raises(UnicodeEncodeError):
        encode_text("東", "cp1252")


def test_plain_text_with_an_escape_or_a_form_feed_is_utf8():
    for data in (b"", b"a\x0cb", b"a\x1b[1mb", b"a\x08b"):
        assert decode_text(data, "file") == (data.decode(), "utf-8")


SENTENCES = {  # in each encoding, three captions
    "utf-8": "A dog runs. | Ein Hund läuft über die Wiese. | 犬が走っている。",
    "cp1252": "Ein Hund läuft über die grüne Wiese. | Zwei Mädchen spielen draußen im Schnee. | Der Männer",
    "latin1": "Un garçon joue à la plage près de la mer. | Un chien très mouillé | Deux enfants à côté",
    "cp1250": "Pies biegnie przez zieloną łąkę. | Mężczyzna jedzie na rowerze | Chłopiec skacze",
    "iso8859_2": "Pies biegnie przez zieloną łąkę. | Mężczyzna jedzie na rowerze | Chłopiec skacze",
    "cp1251": "Собака бежит по зелёной траве. | Двое детей играют в снегу. | мальчик прыгает",
    "koi8_r": "Собака бежит по зелёной траве. | Двое детей играют в снегу. | Мужчина едет на велосипеде.",
    "cp1253": "Ένας σκύλος τρέχει στο πράσινο γρασίδι. | Δύο παιδιά παίζουν στο χιόνι. | Ένας άνδρας",
    "cp1254": "Bir köpek yeşil çimenlerde koşuyor. | İki çocuk karda oynuyor. | Adam ağacın altında",
    "cp1255": "כלב רץ על הדשא הירוק. | שני ילדים משחקים בשלג. | גבר רוכב על אופניים",
    "cp1256": "كلب يجري على العشب الأخضر. | طفلان يلعبان في الثلج. | رجل يركب دراجة",
    "cp932": "犬が緑の草の上を走っている。 | 二人の子供が雪の中で遊んでいる。 | 猫が寝ている",
    "euc_jp": "犬が緑の草の上を走っている。 | 二人の子供が雪の中で遊んでいる。 | 猫が寝ている",
    "gb18030": "一只狗在绿色的草地上奔跑。 | 两个孩子在雪地里玩耍。 | 一个男人骑自行车过桥",
    "big5": "一隻狗在綠色的草地上奔跑。 | 兩個孩子在雪地裡玩耍。 | 一個男人騎自行車過橋",
    "euc_kr": "개가 푸른 잔디 위를 달리고 있다. | 두 아이가 눈 속에서 놀고 있다. | 남자가 자전거를 탄다",
    "cp874": "สุนัขวิ่งบนหญ้าสีเขียว | เด็กสองคนเล่นหิมะ | ผู้ชายขี่จักรยาน",
    "mac_roman": "Ein Hund läuft über die grüne Wiese. | Zwei Mädchen spielen draußen. | Der Männer",
    "cp850": "Ein Hund läuft über die grüne Wiese. | Zwei Mädchen spielen draußen. | Der Männer",
}


@pytest.mark.parametrize("lines", [1, 3, 40])
@pytest.mark.parametrize("encoding", SENTENCES)
def test_text_is_read_in_its_own_encoding(encoding, lines):
    captions = SENTENCES[encoding].split(" | ")
    text = "".join(f"img_{number};{captions[number % 3]}\r\n" for number in range(lines))
    assert decode_text(text.encode(encoding), "a")[0] == text


def test_marks_of_windows_in_a_word_or_two():
    for text in ("it’s", "Café – schön", "A “red” dog…"):
        assert decode_text(text.encode("cp1252"), "a") == (text, "cp1252")


@pytest.mark.parametrize(
    "data, part",
    [
        (b"id,caption\na,A dog\nb,A \0cat\n", "a.txt: not a text file (byte 23, in line 3"),
        ("grün über schön früh\n".encode() * 3 + b"gr\xfcn", "in line 4"),
        (b"PK\x03\x04\x14", "Excel"),
        (b"\x89PNG\r\n", "PNG image"),
    ],
)
def test_files_of_captions_that_are_no_text(data, part, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_text(tmp_path / "a.txt")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path):
    for path, part in ((tmp_path / "none.txt", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(UserError, match=part):
            read_text(path)
