"""Texts on which tokenizers often disagree, and a few plain ones. Written for this test."""

SENTENCES = [
    "High blood pressure often causes no symptoms, so it is measured at every visit.",
    "体温38.6℃，咳嗽3天；patient takes 2.5 mg of bisoprolol daily — next visit: 2031-04-09.",
]

QUESTIONS = [
    "What are the symptoms of iron deficiency?",
    "How is a broken wrist treated?",
    "Can I take ibuprofen together with aspirin?",
]

# Pieces are separated by a broken bar; line breaks are ignored.
ENGLISH = """it's¦It'S¦they'll've¦o'clock¦'tis¦rock'n'roll¦don’t¦“quoted”¦‘so’¦re-enter¦co-operate¦naïve café¦fiancée¦e.g.¦
i.e.¦U.S.A.¦Dr.Smith¦Mr. O'Neill¦A&E¦and/or¦well--known¦what?!¦no...¦yes…¦(sic)¦[note]¦{set}¦x's¦Xs'¦THE END¦
iPhone¦McDonald¦pH¦mRNA¦COVID-19¦IL-6¦CD4+¦β-blocker¦α1-antitrypsin¦Na+/K+¦HbA1c¦T4N0M1¦methylprednisolone¦
pneumonoultramicroscopicsilicovolcanoconiosis¦otorhinolaryngological¦aaaaaaaaaaaaaaaaaaaaaaaaa¦zzzzqxjkw¦
ThisIsCamelCase¦this_is_snake_case¦SCREAMING_SNAKE¦kebab-case-word"""
NUMBERS = """0¦7¦42¦007¦1234¦98765¦1234567890¦3.14159¦.5¦5.¦1,234,567.89¦1.234.567,89¦1e10¦6.02e-23¦-40¦+3¦±2¦1/2¦½¦¾¦²¦
x²+y³¦10%¦50‰¦$12.30¦€7¦£1m¦¥900¦#1¦No.5¦2nd¦21st¦IV¦XIV¦0x1F¦0b1011¦12:34:56¦2024-02-29¦29/02/2024¦
+1 (555) 010-9999¦192.168.0.1¦v1.2.3-rc4¦1st2nd3rd¦a1b2c3¦10mg¦10 mg¦5×10⁹/L¦120/80mmHg¦37.2°C¦n=48¦p<0.001¦٣٤٥¦
１２３¦一百二十三¦Ⅷ¦①②③¦𝟙𝟚¦1_000_000¦3-5¦3–5¦0.1+0.2"""
SCRIPTS = """头痛¦患者，男，45岁。¦血糖7.8mmol/L¦「你好」¦你好world¦中文 与 English 混排¦糖尿病是一种慢性病！¦ひらがな¦カタカナ¦漢字かな交じり文¦
한국어 문장¦안녕하세요123¦Привет, мир¦
ЁЛКА¦Ελληνικά¦ἀρχή¦עברית¦العربية ١٢¦हिन्दी¦नमस्ते जी¦ภาษาไทย¦tiếng Việt¦İstanbul¦ı¦straße¦ẞ¦ﬁnal¦ǅ¦Ǆ¦Œuvre¦
ñandú¦Łódź¦č¦e\u0301¦n\u0303o¦A\u030a¦क्षि¦ᚠᛇ¦𐍈¦𠮷野¦ﷺ¦㍿¦㎎¦ｆｕｌｌ¦ﾊﾝｶｸ"""
CODE = """x+=1;¦i++¦a==b¦a===b¦a!=b¦->¦=>¦<=¦::¦//¦/* c */¦# no¦<!-- c -->¦<b>bold</b>¦&amp;¦&#x41;¦a[0][-1]¦f(x)(y)¦
{"k": [1, null]}¦lambda x: x**2¦if (a&&b||!c)¦for(;;){}¦#include <a.h>¦fn f<'a>(x: &'a str) -> u8¦
let mut v = vec![0u8; 4];¦SELECT * FROM t WHERE a='b';¦$HOME/.cache¦C:\\dir\\n¦
https://example.org/a?b=c&d=%20#e¦me@example.org¦@user¦#tag¦```rs¦**bold**¦_it_¦~~no~~¦- [ ] todo¦\\frac{1}{2}¦
$x_i^2$¦^[a-z]+\\d*$¦%s%d%%¦0xDEADBEEF¦!important¦a\\tb¦"\\u0041"¦~/x¦--flag=-1¦&mut *p¦a<b>c¦<<EOF¦>>>¦...args¦
?.¦??=¦@@¦`id`"""
SYMBOLS = """😀¦👍🏽¦👩‍⚕️¦👨‍👩‍👧¦🏳️‍🌈¦🇨🇭¦1️⃣¦❤️¦❤¦☺¦♀¦→¦⇒¦∑∫√∞¦≤≥≠≈¦µg¦μg¦Ω¦°¦™©®¦•¦·¦—¦–¦―¦…¦¿¡¦«»¦‹›¦„¦‰¦†‡§¶¦¢¦₿¦★☆¦♫¦☢¦⚕¦𝒜𝓑¦
ℝℕ¦🫀🫁¦🦠🧬¦💊x2¦^_^¦:-)¦¯\\_(ツ)_/¯¦(╯°□°)╯¦!!!¦???¦?!?!¦***¦---¦___¦===¦~~~¦///¦\\\\\\¦||¦\u200b¦\u200d¦\ufeff¦
\u00ad¦\u202e¦\ufffd"""
SPACES = [
    "a  b", "  two", "   three", "end  ", "1  2   3", "x\t\ty", "\t1", "\n\n\nz", "\r\nw", " \n \n ",
    "a\u00a0b", "\u3000全角", "\u2003em", "\u2009thin 5", "tab\t \tmix", "    if x:\n\t\treturn  1", "a \u00a0 b",
    "end of line \n", "\x0bv\x0cf", "\u2028ls", "…  …", ".  Two", "?   9", "  12", "    .", "中  文", "😀  😀",
    "\n\t- item", "\x85n", "\x7fd\x01c",
]
SPECIAL = [
    "<|im_start|>", "x<|im_end|>y", " <|im_end|> ", "<|im_end|><|im_end|>", "<|im_end", "<|endoftext|>1",
    "<|im_start|>user\nHi<|im_end|>\n", "<repo_name>a", "<filename>", "<empty_output>  ", "<file_sep>\n",
    "</s>", "<s>", "<unk>", "[INST]", "<|user|>", "<think>", "<0x0A>",
]


def pieces() -> dict[str, list[str]]:
    """Returns all difficult pieces by kind."""
    tables = {"english": ENGLISH, "numbers": NUMBERS, "scripts": SCRIPTS, "code": CODE, "symbols": SYMBOLS}
    lists = {kind: table.replace("\n", "").split("¦") for kind, table in tables.items()}
    return lists | {"spaces": SPACES, "special": SPECIAL}


def long_texts() -> dict[str, str]:
    """Returns one long text per kind: its pieces separated, then concatenated, which creates new pieces."""
    between = {"english": "\n", "scripts": ", ", "code": "\n  ", "spaces": "|", "special": "."}
    return {kind: between.get(kind, " ").join(of) + "\n\n" + "".join(of) for kind, of in pieces().items()}
