"""Twelve abstracts in PubMedQA's format. The studies are invented; nothing in them is a medical fact."""

STUDIES: list[tuple[str, list[str], str]] = [
    (
        "Does a daily walk shorten the stay after hip surgery?",
        ["Early movement is recommended after hip surgery, but its dose is debated.",
         "We assigned 124 patients to a walk of 20 minutes per day or to usual care.",
         "The stay was 5.1 days with walks and 6.8 days without (p = 0.004)."],
        "yes",
    ),
    (
        "Is green light better than white light for sleep on intensive care wards?",
        ["Sleep is poor on intensive care wards.",
         "In a crossover study, 38 patients slept under green or white night lights.",
         "Sleep lasted 4.2 ± 1.1 h under green and 4.3 ± 1.0 h under white light."],
        "no",
    ),
    (
        "Can a chewing test predict malnutrition in nursing homes?",
        ["Malnutrition is often noticed late. Chewing is easy to test with a two-coloured gum.",
         "Among 212 residents the test found 61% of those who lost weight within a year; 47% of the others failed it too."],
        "maybe",
    ),
    (
        "Do text messages improve the use of asthma inhalers by teenagers?",
        ["Teenagers often forget their inhalers.",
         "Eighty-six teenagers received a daily message or none for 12 weeks; doses were counted electronically.",
         "Use rose from 42% to 71% of prescribed doses with messages and did not change without.",
         "Twelve weeks after the last message the difference was still 18 points."],
        "yes",
    ),
    (
        "Is serum exemplin a marker of kidney stones?",
        ["Exemplin is raised in some patients with kidney stones.",
         "Levels in 55 patients (1.9 µg/L; IQR 1.2–2.8) and 60 controls (1.8 µg/L; IQR 1.1–2.9) overlapped almost wholly."],
        "no",
    ),
    (
        "Does music during colonoscopy reduce the need for sedation?",
        ["Sedation carries risks, and music is cheap.",
         "We compared 150 procedures with music of the patient's choice with 150 without.",
         "The median dose was 3 mg in both groups. Patients with music were more satisfied."],
        "no",
    ),
    (
        "Are night shifts linked to back pain in nurses?",
        ["Back pain is common among nurses.",
         "A questionnaire was sent to 2,300 nurses, of whom 1,127 answered.",
         "Pain was reported by 48% with and 39% without night shifts; after adjustment for lifting, "
         "the odds ratio was 1.16 (95% CI 0.97 to 1.39)."],
        "maybe",
    ),
    (
        "Should stitches be removed earlier in children?",
        ["Stitches are usually removed after 7 days.",
         "In 90 children with cuts on the face they were removed after 4 or 7 days. No wound opened in either group.",
         "Scars after 6 months were rated better after 4 days (3.1 against 4.4 of 10; p < 0.01)."],
        "yes",
    ),
    (
        "Does vitamin Q prevent winter colds in kindergartens?",
        ["Parents often ask for vitamin Q.",
         "Three hundred children took vitamin Q or a placebo from November to March.",
         "There were 2.4 colds per child in both groups."],
        "no",
    ),
    (
        "Is a photograph enough to judge a mole?",
        ["Patients increasingly send photographs of moles.",
         "Two dermatologists judged 400 photographs and then the moles themselves.",
         "They agreed with their own judgement in 93% of cases (κ = 0.86), and no melanoma was missed."],
        "yes",
    ),
    (
        "Can handgrip strength replace the walking test in heart failure?",
        ["The walking test takes time and room.",
         "In 74 patients handgrip strength correlated with walking distance (r = 0.52), "
         "but less so in women (r = 0.31) and in those over 80 years."],
        "maybe",
    ),
    (
        "Does a second reader find more fractures on X-rays at night?",
        ["Fractures are missed more often at night — 夜间 readings are done by one person in most hospitals.",
         "We reread 1,050 images. The second reader found 31 fractures that the first had missed, 22 of them at night."],
        "yes",
    ),
]  # fmt: skip


def items() -> dict[str, dict]:
    """Returns the studies by invented PubMed id, with the keys of the official files that are needed here."""
    keys = ("QUESTION", "CONTEXTS", "final_decision")
    return {str(90_000_001 + i): dict(zip(keys, study)) for i, study in enumerate(STUDIES)}
