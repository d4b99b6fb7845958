"""What a model is asked to go on with, to write text to calibrate on. Knows no model.

Openings are a few words: what comes after them is the model's alone. Passages are a paragraph each, written for this purpose and not by
the model: they surprise it more than what it writes itself, as the text does that it will be used on (benchmarks/README.md).
"""

OPENINGS = (
    "The history of the region begins with",
    "Born in 1874, she was",
    "The species is found in",
    "The album was released in",
    "During the war, the battalion",
    "The film tells the story of",
    "In the final match of the season,",
    "The river rises in the mountains of",
    "Construction of the bridge began in",
    "The storm made landfall on",
    "According to the report published on Tuesday,",
    "Officials said on Friday that",
    "Scientists have discovered that",
    "Dear Sir or Madam,",
    "Abstract. We study the problem of",
    "Theorem 1. Let",
    "To solve the equation, we first",
    "The main difference between the two methods is",
    "Chapter One\n\nIt was a cold",
    '"I don\'t believe you," she said,',
    "Once upon a time, in a village",
    "Ingredients:\n- 2 cups of",
    "How to repair a bicycle: first,",
    "import os\nimport sys\n\n\ndef main():\n",
    "function render(items) {\n  const",
    'class Stack:\n    """',
    "Q: What causes the seasons?\nA:",
    "User: Can you explain how a computer stores numbers?\nAssistant:",
    "Review: I bought this last month and",
    "The patient was admitted with",
    "The court held that",
    "Under the terms of the agreement,",
    "The economy grew by",
    "Philosophers have long argued that",
    "The painting shows",
    "In music theory, a",
    "The planet orbits",
    "La ville se trouve",
    "El libro fue escrito",
    "город расположен",
    "这本书",
    "<!DOCTYPE html>\n<html>\n<head>\n<title>",
    "<p>The <b>",
    '<?xml version="1.0"?>\n<',
    "== History ==\n\n",
    "# Getting started\n\n## ",
    "| Year | Title | Notes |\n|---|---|---|\n| ",
    "\\section{Introduction}\n",
    '{"name": "',
    "$ git log\n",
    "SELECT name, ",
    "Usage: copy [options] <source> <target>\n",
    "Dear <name>,\n\nThank you for",
    "Replace <user> and <host> with",
    "He was educated at",
    "The species, a member of the family",
    "The song received generally positive reviews from",
    "In the second half of the game,",
    "The squadron was re-equipped with",
    "The church was built in",
    "Her first novel,",
    "The highway begins at",
    "Early in the morning of 12 March,",
    "The episode was written by",
    "The main characters are",
    "The king died in",
)
PASSAGES = (
    "Tern Island lies some four kilometres off the coast, and at low tide a causeway of black shingle joins it to the mainland. A "
    "chapel, dedicated to St Brannoc and in ruins since the 1640s, stands on its highest point (61 m); beside it is a light, unmanned "
    "since 1988, whose keepers' cottages are let to ornithologists between April and September.",
    "Halvorsen joined the company as a clerk at fifteen. By 1911 she had charge of its Bergen office, and two years later, against the "
    "advice of both partners, bought the steamer Vesle Kari with borrowed money; the purchase, mocked at the time, paid for itself "
    "before the war had ended. She never spoke of it afterwards, although",
    'The second single, a slow waltz with brass by the Leeds arranger Tom Okafor, divided critics. One called it "the sound of a band '
    'packing its suitcases"; others, among them the reviewer of a Dublin weekly, thought its middle eight the best thing on the record. '
    "It reached number 17 in the UK and stayed there for nine weeks.",
    "Adults are 9-12 cm long, olive above and paler below, with a dark bar behind the eye. Females lay up to 40 eggs under flat stones; "
    "the male guards them, fanning with his tail, until they hatch after about a fortnight. Unlike its relatives, the species tolerates "
    "brackish water, and populations persist in ditches that dry out in most summers.",
    "With the bridge at Orlec destroyed, 3rd Brigade had no choice but to cross upstream. Two companies waded the ford before dawn under "
    "mortar fire, lost nineteen men, and by 07:30 held the mill on the far bank; the guns, however, could not follow, and a "
    "counter-attack that evening drove the survivors back to the cemetery, where",
    "Town went into the interval two goals down. Ferreira, on for the injured Lund, pulled one back within a minute of the restart, and "
    "after a spell in which neither goalkeeper touched the ball, Achterberg's header from a corner made it 2-2. The winner, deep in "
    "stoppage time, was a deflection that nobody claimed.",
    "The cathedral's west front, begun under Bishop Aldric in 1187 and not completed until the 1320s, mixes three styles without "
    "apology. Its lower arcade is round-arched and heavy; above it rise lancets in groups of five; and the great window, with its wheel "
    "of twelve petals, belongs to the age of glass and money that followed.",
    "In the third act the letters are read aloud. Marguerite learns that the money was never sent, that her brother has known of it for "
    "years, and that the house - the only thing her father had left them - must be sold by Easter. The scene was cut at the first "
    "performance, in Lyon, and restored only when the play was revived.",
    "Prices rose by 0.4 per cent in March, less than economists had expected, as cheaper fuel offset another increase in rents. The "
    'central bank\'s governor, speaking in Basel, said that it was "too soon to speak of a turn", and markets, which had begun the day '
    "higher, ended it almost where they had started.",
    "Rescue teams reached the last of the stranded walkers shortly after midnight on Sunday, police said. All eleven, among them two "
    "children aged six and nine, were suffering from cold but otherwise unhurt. The party had set out without maps and, according to a "
    "spokeswoman for the mountain service, ignored a warning posted at the car park.",
    "I found the key where Aunt Ruth had said it would be, under the third flowerpot, wrapped in a page of the Gazette. Inside, nothing "
    "had been touched. The clock had stopped at ten to four; a cup stood by the sink; somebody - I supposed Daniel - had folded all of "
    "the blankets and left them on the stairs.",
    '"You can\'t be serious," said Imogen. "It\'s four hundred miles, Pa, and the van won\'t start."\n'
    "\n"
    '"It started yesterday."\n'
    "\n"
    '"It coughed yesterday. That\'s not the same." She put down her fork. "Anyway, who would look after the goats? And don\'t '
    'say Mr Pell. Not after last time."',
    "When a liquid is heated from below, warm fluid expands, becomes lighter and tends to rise; viscosity and the conduction of heat "
    "oppose it. Below a critical temperature difference nothing moves. Just above it, rolls appear whose width is about the depth of the "
    "layer, and their direction, left or right, is decided by the smallest of disturbances.",
    "Proof. Suppose, to the contrary, that $x_n$ does not converge. Since the sequence is bounded, two of its subsequences have "
    "different limits, say $a < b$. Choose $\\varepsilon = (b - a)/3$; then for infinitely many $n$ both $|x_n - a| < \\varepsilon$ and "
    "$|x_{n+1} - b| < \\varepsilon$ hold, which contradicts the lemma.",
    "Mrs K., 67, came to the clinic with a three-week history of breathlessness on climbing stairs. She had no chest pain and had never "
    "smoked. Pulse 96/min, irregular; blood pressure 148/86 mmHg; ankles slightly swollen. An ECG showed atrial fibrillation, and she "
    "was started on a beta blocker while further tests were arranged.",
    "7.2 The Tenant shall not assign, sublet or part with possession of the Premises or any part thereof without the prior written "
    "consent of the Landlord, such consent not to be unreasonably withheld or delayed, save that the Tenant may, on giving fourteen (14) "
    "days' notice, share occupation with",
    "Soak the beans overnight, drain them and put them on with fresh water, two bay leaves and an onion cut in half. Do not add salt "
    "yet. After an hour or so, when they crush easily between finger and thumb, stir in the tomatoes (tinned will do), 1 tsp smoked "
    "paprika and the sausage, and simmer until thick.",
    "Hi all, quick update from Thursday's call: the supplier can't make the 14th, so we've moved delivery to the week after (Tue or Wed, "
    "tbc). Priya has the new drawings; please check the hole spacing on sheet 3 BEFORE you order anything. Also - whoever borrowed the "
    "label printer, it's needed upstairs. Thanks! J.",
    "I've had these boots since October and walked maybe 300 km in them. Good: warm, light, the laces stay tied. Bad: the left sole "
    "began to come off after a month (glued it myself, so far so good), and they are NOT waterproof whatever the box says. 3/5, would "
    "buy again at half the price.",
    "The senator's mistake was to think that a majority is an argument. It isn't. It is a permission, and like all permissions it can be "
    "withdrawn; those who forget this, and they are found in every party and every century, spend it on things they never wished to "
    "defend, and find that there is nothing left when",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    '    """Two sorted lists as one."""\n'
    "    out, i, j = [], 0, 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            out.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            out.append(right[j])\n"
    "            j += 1\n"
    "    return out + left[i:] + right[j:]\n"
    "\n"
    "\n"
    "class",
    "    def _flush(self, force=False):\n"
    "        # Called with the lock held.\n"
    "        if not self._pending and not force:\n"
    "            return 0\n"
    "        try:\n"
    "            count = self._sink.write_many(self._pending)\n"
    "        except OSError as error:\n"
    '            log.warning("%s: cannot write (%s), %d kept", self.name, error, len(self._pending))\n'
    "            raise\n",
    "static int read_header(FILE *f, struct header *h)\n"
    "{\n"
    "\tunsigned char buf[16];\n"
    "\n"
    "\tif (fread(buf, 1, sizeof buf, f) != sizeof buf)\n"
    "\t\treturn -1;\n"
    '\tif (memcmp(buf, "RIFX", 4) != 0)\n'
    "\t\treturn -EINVAL;\n"
    "\th->size = buf[4] | buf[5] << 8 | buf[6] << 16;\n"
    "\t",
    "export async function loadUser(id) {\n"
    "  const response = await fetch(`/api/users/${id}`, { headers: { Accept: 'application/json' } });\n"
    "  if (!response.ok) {\n"
    "    throw new Error(`user ${id}: ${response.status}`);\n"
    "  }\n"
    "  return response.json();\n"
    "}\n"
    "\n"
    "export",
    "    @Override\n"
    "    public Optional<Order> findById(long id) {\n"
    '        String sql = "SELECT id, customer, total FROM orders WHERE id = ?";\n'
    "        List<Order> rows = jdbc.query(sql, (rs, n) -> new Order(rs.getLong(1), rs.getString(2), rs.getBigDecimal(3)), id);\n"
    "        return rows.stream().findFirst();\n"
    "    }\n",
    "#!/bin/sh\n"
    "set -eu\n"
    "\n"
    'for file in "$@"; do\n'
    "    case $file in\n"
    '        *.tar.gz) tar -xzf "$file" ;;\n'
    '        *.zip) unzip -q "$file" ;;\n'
    '        *) echo "$0: $file: unknown format" >&2; exit 2 ;;\n'
    "    esac\n"
    "done\n",
    "## Installation\n"
    "\n"
    "You need **Python 3.9** or later and a C compiler.\n"
    "\n"
    "```\n"
    "pip install tidelib\n"
    "tidelib --version\n"
    "```\n"
    "\n"
    "On Windows, use the installer from the [releases page](https://example.org/releases) instead; it is built for 64-bit "
    "systems only. If you see `error: no such table`, delete `~/.tidelib/cache.db` and",
    '<div class="card">\n'
    "  <h2>Opening hours</h2>\n"
    "  <ul>\n"
    "    <li>Mon&ndash;Fri: 9&nbsp;am to 5&nbsp;pm</li>\n"
    "    <li>Sat: closed</li>\n"
    "  </ul>\n"
    '  <a href="/contact?from=hours">Write to us</a>\n'
    "</div>\n",
    '[\n  {"id": 4071, "city": "Graz", "lat": 47.0707, "lon": 15.4395, "tags": ["river", "hill"], "since": null},\n  '
    '{"id": 4072, "city": "Split", "lat": 43.5081,',
    "Le marché se tenait sous les platanes, à deux pas de la gare. On y vendait de tout : des fromages, des outils rouillés, des livres "
    "sans couverture et, l'été, ces petites pêches dures qu'il faut laisser mûrir sur le rebord d'une fenêtre. Ma grand-mère, qui "
    "n'achetait jamais rien, y passait pourtant ses matinées à",
    "Le conseil municipal a adopté mardi, par 27 voix contre 14, le projet de tramway présenté en mars. Les travaux, estimés à 310 "
    "millions d'euros, doivent commencer « avant la fin de l'année », selon l'adjointe chargée des transports. L'opposition, qui "
    "réclamait un référendum, a quitté la salle avant le vote ; plusieurs riverains ont annoncé",
    "Der Zug nach Villach hatte wie immer Verspätung. Auf dem Bahnsteig standen vielleicht zwanzig Leute, die meisten mit Rucksäcken, "
    "und sahen auf die Anzeige, als könnte man sie überreden. »Das war früher nicht so«, sagte ein Mann mit Hut, und weil niemand "
    "antwortete, sagte er es noch einmal, lauter.",
    "La sequía de aquel año obligó al municipio a cortar el agua tres noches por semana. Los vecinos llenaban cubos, bañeras y hasta los "
    "jarrones; en la plaza, la fuente quedó muda desde junio. El alcalde, que había prometido un embalse nuevo, dijo que",
    "В начале сентября экспедиция вышла к берегу озера. Лодок там не оказалось, а проводник, нанятый ещё в городе, отказался идти "
    "дальше. Пришлось ждать. На пятый день",
    "小镇的早晨从码头开始。渔民把昨夜的收获搬上岸,商贩已经在旁边等着,用手指比划价格。六点以后,",
    "Bibliography\n"
    "\n"
    "Arkwright, P. (1998). Tides and Trade: Small Ports of the North Sea, 1550-1720. 2nd ed. Hull: Quayside Press, pp. 41-77.\n"
    'Demir, S. and J. Van Loon (2007). "Counting herring". Journal of Maritime History 19(3), 215-240.\n',
)
