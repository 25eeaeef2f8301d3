"""Which encoding text files have."""

import codecs
import random

import pytest

from captioning.data.text_files import decode_text, read_text
from utils import UserError

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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_written_back_byte_for_byte(encoding, tmp_path):
    for captions in SENTENCES.values():
        data = f"id;text\r\n{captions}\r".encode(encoding)
        (tmp_path / "a.txt").write_bytes(data)
        text, codec = read_text(tmp_path / "a.txt")
        assert (text, text.encode(codec)) == (f"id;text\r\n{captions}\r", data)


def test_marks_of_windows_in_a_word_or_two():
    for text in ("it’s", "Café – schön", "A “red” dog…"):
        assert decode_text(text.encode("cp1252"), "a") == (text, "cp1252")
    assert decode_text(codecs.BOM_UTF16_BE + "Café".encode("utf-16-be"), "a") == ("Café", "utf-16")


@pytest.mark.parametrize(
    "data, part",
    [
        (b"id,caption\na,A dog\nb,A \0cat\n", "a.txt, line 3: a NUL byte"),
        ("grün über schön früh\n".encode() * 3 + b"gr\xfcn", "line 4: not UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "a.txt, line 1: not UTF-16"),
        (b"PK\x03\x04\x14", "Excel"),
        (b"\x89PNG\r\n", "PNG image"),
        (random.Random(0).randbytes(200).replace(b"\0", b""), "a.txt: it cannot be told which encoding"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_damaged_is_refused(data, part, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_text(tmp_path / "a.txt")
    assert part in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path):
    for path, part in ((tmp_path / "none.txt", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(UserError, match=part):
            read_text(path)
