"""Lists of English words that constraints look in, by grammatical class, and the rules for forms of a verb."""

from __future__ import annotations


def word_set(listed: str) -> frozenset[str]:
    """The words of a block of text."""
    return frozenset(listed.split())


# The stop words of the Snowball list that NLTK ships too, as the runs of letters they leave: "don't" leaves don and t.
STOP_WORDS = word_set(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those am is are was were be
    been being have has had having do does did doing will can should now a an the and but if or because as until
    while of at by for with about against between into through during before after above below to from up down in
    out on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very just s t d ll m o re ve y ain aren couldn didn doesn
    don hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
    """
)

PRONOUNS = word_set(
    """
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves
    this that these those who whom whose which what whoever whomever whatever whichever
    anybody anyone anything everybody everyone everything nobody nothing somebody someone something
    each either neither both all some any none
    """
)

CONJUNCTIONS = word_set("and but for nor or so yet")

# Function words that tell one language of the Latin alphabet from another: shared ones are in neither set.
ENGLISH_FUNCTION_WORDS = word_set(
    """
    the and of is that was for with are you this have from they not but what all were when your can there which their
    will would could should it its he she we his her my our been being these those about into than then because how who
    why some any every by if or as be at an to do does did has had more very just also while where here over under up
    out
    """
)
FOREIGN_FUNCTION_WORDS = word_set(
    """
    el los las una del que por con para como pero más está le les et est dans pour qui sur avec pas une du au nous vous
    der das und ist nicht ein eine mit auf für sich zu il di che è non della sono gli nel een het en niet dat voor zijn
    och att det som är på inte ikke og til av um não uma dos ao mais ja että oli nie jest się na że bir ve bu için yang
    dan ini itu dengan untuk tidak của và là không trong được
    """
)

# --- verbs ----------------------------------------------------------------------------------------------------------

# Base forms that open an English sentence as a verb more often than as a noun or an adjective.
_VERBS = word_set(
    """
    abandon absorb accept accompany accomplish account accuse achieve acknowledge acquire act activate adapt add
    address adjust administer admire admit adopt advance advertise advise advocate affect afford agree aim alert
    align allocate allow alter amend amplify analyse analyze announce annotate answer anticipate apologize appear
    append apply appoint appreciate approach approve archive argue arise arm arrange arrest arrive articulate ask
    assemble assert assess assign assist assume assure attach attack attain attempt attend attract audit authorize
    automate avoid awake award bake balance ban bathe battle bear beat become beg begin behave behold believe belong
    bend bet bind bite blame bleed blend bless block blow boast boil bolster boost borrow bounce bow brace
    brainstorm break breathe breed brew bring broadcast browse brush build bundle burn burst bury buy calculate call
    calm cancel capture care carry carve cast catch categorize cause cease celebrate centralize challenge change
    charge chase chat check cheer cherish chew choose chop circle cite claim clarify classify clean clear click
    climb cling close clutch coach code collaborate collapse collect combat combine come comfort command commence
    comment commit communicate compare compete compile complain complete comply compose compress compute conceal
    concentrate conclude conduct confess configure confirm confront connect conquer consider consist consolidate
    construct consult consume contact contain contemplate continue contrast contribute control convert convey
    convince cook cooperate coordinate cope copy correct correlate correspond count cover craft crash crawl create
    criticize cross crush cry cultivate curate customize cut dance dare deal debate debug decide declare decline
    decorate decrease dedicate deduce deepen defeat defend define delay delegate delete deliver delve demand
    demonstrate deny depart depend depict deploy derive descend describe deserve design desire destroy detail detect
    determine develop devise devote diagnose dice die differ differentiate dig digest diminish dip direct disable
    disagree disappear discard discharge discover discuss dismiss display dissolve distinguish distribute dive
    diversify divide document dominate donate double doubt download draft drag draw dream dress drift drill drink
    drive drizzle drop drown dry dump dust dwell earn ease eat edit educate elaborate elect elevate eliminate embark
    embed embody embrace emerge emit emphasize employ empower enable encourage encounter end endorse endure enforce
    engage enhance enjoy enlist ensure enter entertain equip erase escape establish estimate evaluate evolve examine
    exceed excel exchange excite exclude execute exercise exert exhibit exist expand expect experience experiment
    explain explode exploit explore export expose express extend extract face facilitate fade fail fall familiarize
    fasten favor favour fear feed feel fetch fight figure fill filter finalize find finish fit fix flee fling flip
    float flourish flow fly focus fold follow forbid force forecast foresee forget forgive form formalize format
    formulate foster frame free freeze fry fuel fulfill function fund gain gather gauge gaze generate get give
    glance glow go govern grab grade grant grapple grasp greet grill grind grip grow guarantee guard guess guide
    hail halt handle hang happen harness hate haul have head heal hear heat help hesitate hide highlight hike hire
    hit hold honor honour hope host hover hug hunt hurry hurt identify ignite ignore illuminate illustrate imagine
    imitate immerse implement imply import impose impress improve improvise include incorporate increase indicate
    infer influence inform initialize initiate inject inquire insert inspect inspire install instruct integrate
    intend interact interpret interrupt intervene interview introduce invent invest investigate invite invoke
    involve isolate iterate join joke judge juggle jump justify keep kick kill kiss kneel knit knock know label
    labor lack land last laugh launch lay lead lean leap learn leave lend let leverage lie lift light like limit
    line link list listen live load locate lock log look lose love lower maintain make manage manipulate map march
    mark marry marvel mash master match maximize mean measure meditate meet melt memorize mend mention merge migrate
    mimic minimize miss mix model modify monitor motivate mount move multiply mute name narrate narrow navigate need
    neglect negotiate nod normalize note notice notify nourish number nurture obey object observe obtain occupy
    occur offer omit open operate oppose optimize opt order organise organize orient outline overcome overlook
    oversee owe own pack paint park part participate pass paste patch pause pay peel perceive perform permit persist
    persuade pick pin pitch place plan plant play plead please plot plug point ponder pop populate position possess
    post postpone pour practice practise praise pray preach precede predict prefer preheat prepare prescribe present
    preserve press presume pretend prevent print prioritize probe proceed process produce program progress prohibit
    project promise promote prompt pronounce propose protect protest prove provide prune publish pull pump punish
    purchase pursue push put qualify quantify question quit quote race raise rank reach react read realize reap
    reason reassure rebuild recall receive recite recognize recommend reconcile record recover recruit recycle
    redesign reduce refactor refer refine reflect reform refresh refuse refute regain regard register regret
    regulate reinforce reject relate relax release relieve rely remain remember remind remove render renew rent
    repair repeat rephrase replace replicate reply report represent request require rescue research resemble reserve
    reset reside resist resolve respect respond rest restart restore restrict result resume retain rethink retire
    retrieve return reuse reveal reverse review revise revisit revive revolve reward rewrite ride ring rinse rise
    risk roast rob roll rotate rub ruin rule run rush sail salute sample satisfy sauté save savor say scale scan
    scatter schedule scrape scratch scream screen scroll search season secure see seek seem seize select sell send
    sense separate serve set settle sew shake shape share sharpen shed shift shine ship shoot shop shorten shout
    show shred shrink shut sift sigh sign signal simmer simplify simulate sing sink sit sketch skip slay sleep slice
    slide slip slow smell smile smoke smooth snap snatch sneak soak soar solve sort sound sow spare spark speak
    specialize specify speculate speed spell spend spice spill spin split spoil sponsor spot spread spring sprinkle
    squeeze stabilize stack stand standardize stare start state stay steal steam steer step stick stimulate stir
    stop store storm strain strengthen stress stretch strike strive structure struggle study stuff submit subscribe
    substitute subtract succeed suffer suggest suit summarise summarize summon supervise supply support suppose
    surge surrender surround survey survive suspect suspend sustain swallow swap swear sweep swim swing switch
    symbolize synchronize synthesize tackle tag tailor take talk tap target taste teach tear tell tend terminate
    test thank think thrive throw tie tighten tolerate toss touch tour trace track trade train transcend transfer
    transform transition translate transmit travel traverse treasure treat tremble trigger trim trust try tune turn
    tweak twist type uncover undergo underline underscore understand undertake unearth unfold unify unite unleash
    unlock unpack unravel unveil update upgrade uphold upload urge use utilize validate value vanish vary venture
    verify view visit visualize voice volunteer vote wait wake walk wander want warm warn wash waste watch water
    weaken wear weave weigh welcome whip whisk whisper widen win wipe wish withdraw withhold withstand witness
    wonder work worry worship wrap wrestle write yearn yell yield zoom
    """
)

# Forms that no rule below gives, the auxiliaries that are tagged as verbs (the modals are not) among them.
_IRREGULAR_FORMS = word_set(
    """
    be am is are was were been being do does did done doing have has had having go goes went gone ate eaten began
    begun bent bit bitten bled blew blown bore born bought bound bred broke broken brought built burnt came caught
    chose chosen clung crept dealt drank drawn dreamt drew driven drove drunk dug dwelt fallen fed fell felt fled
    flew flown flung forbade forbidden foresaw foreseen forgave forgiven forgot forgotten fought found froze frozen
    gave given got gotten grew grown ground heard held hid hidden hung kept knelt knew known laid lain lay led left
    lent lit lost made meant met overcame overseen oversaw paid proven ran rang rebuilt rethought rewritten rewrote
    ridden risen rode rose rung said sang sank sat saw seen sent sewn shaken shed shone shook shot shown shrank
    shrunk slept slid sold sought sown spent spoke spoken spun spat stole stolen stood struck stuck strove striven
    sung sunk swam sworn swore swept swum swung taken taught thought threw thrown told took tore torn underwent
    undergone understood undertaken undertook upheld withdrawn withdrew withheld withstood woke woken won wore worn
    wove woven written wrote wound
    """
)


def is_verb_form(word: str) -> bool:
    """Is the lower-case word a form of a verb: base, -s, past, participle or -ing? Modals (can, will ...) are not."""
    if word in _VERBS or word in _IRREGULAR_FORMS:
        return True
    stems: list[str] = []
    if word.endswith("ing"):
        stems = _stems(word[:-3])
    elif word.endswith("ed"):
        stems = _stems(word[:-2]) + ([word[:-3] + "y"] if word.endswith("ied") else [])
    elif word.endswith("es"):
        stems = [word[:-1], word[:-2]] + ([word[:-3] + "y"] if word.endswith("ies") else [])
    elif word.endswith("s"):
        stems = [word[:-1]]
    return any(stem in _VERBS for stem in stems)


def _stems(cut: str) -> list[str]:
    """Base forms a form less its -ing or -ed may come from: walk, mak(e), run(n)."""
    doubled = [cut[:-1]] if len(cut) > 2 and cut[-1] == cut[-2] else []
    return [cut, cut + "e", *doubled]
