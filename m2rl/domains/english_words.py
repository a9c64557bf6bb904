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
    el los las una del que por con para como pero más está le les et est dans pour qui sur avec pas une du au nous
    vous der das und ist nicht ein eine mit auf für sich zu il di che è non della sono gli nel een het en niet dat
    voor zijn och att det som är på inte ikke og til av um não uma dos ao mais ja että oli nie jest się na że bir ve
    bu için yang dan ini itu dengan untuk tidak của và là không trong được ang ng sa mga hindi ya wa kwa ni și din
    """
)

# --- verbs ----------------------------------------------------------------------------------------------------------

# Base forms that open an English sentence as a verb more often than as a noun or an adjective.
_VERBS = word_set(
    """
    abandon absorb accept accompany accomplish account accuse achieve acknowledge acquire act activate adapt add
    address adjust administer admire admit adopt advance advertise advise advocate affect afford agree aim alert
    align allocate allow alter amend amplify analyse analyze annotate announce answer anticipate apologize appear
    append apply appoint appreciate approach approve archive argue arise arm arrange arrest arrive articulate ask
    assemble assert assess assign assist assume assure attach attack attain attempt attend attract audit authorize
    automate avoid awake award bake balance ban bask bathe battle bear beat beckon become beg begin behave behold
    believe belong bend bestow bet bid bind bite blame bleed blend bless block bloom blossom blow boast boil bolster
    boost borrow bounce bow brace brainstorm break breathe breed brew brim bring broadcast broil browse brush build
    bundle burn burst bury buy buzz calculate calibrate call calm cancel capture care carry carve cascade cast catch
    categorise categorize cause cease celebrate centralize challenge change chant charge chart chase chat check
    cheer cherish chew choose chop circle cite claim clarify clasp classify clean clear click climb cling close
    clutch coach coax code coexist coil collaborate collapse collect combat combine come comfort command commence
    comment commit communicate compare compensate compete compile complain complete comply compose compress compute
    conceal conceive concentrate conceptualize conclude conduct confess configure confine confirm conform confront
    congratulate connect conquer consent conserve consider consist consolidate constrain construct consult consume
    contact contain contemplate contextualize continue contrast contribute control convert convey convince cook
    cooperate coordinate cope copy correct correlate correspond count counter cover craft crash crawl create
    criticize cross crumble crunch crush cry cultivate curate customize cut dance dangle dare dash dazzle deal
    debate debug decide decipher declare decline decode decorate decrease decrypt dedicate deduce deduct deem deepen
    default defeat defend define degrade delay delegate delete delight delineate deliver delve demand demonstrate
    demystify denote deny depart depend depict deplete deploy depreciate derive descend describe deserve design
    designate desire destroy detail detect deter deteriorate determine develop deviate devise devote devour diagnose
    dice dictate die differ differentiate dig digest dilute diminish dip direct disable disagree disappear discard
    discern discharge disclose discourage discover discuss dismiss dispatch display dispose disrupt dissect
    disseminate dissolve distinguish distort distribute dive diverge diversify divert divide divulge document
    dominate donate double doubt download draft drag drain draw dream dress drift drill drink drive drizzle drop
    drown dry dump dust dwell dwindle earn ease eat echo edit educate elaborate elect elevate elicit eliminate
    elucidate emanate embark embed embellish embody embrace emerge emit empathize emphasise emphasize employ empower
    emulate enable enact encapsulate enchant encircle encode encompass encounter encourage encrypt end endanger
    endorse endure enforce engage engulf enhance enjoy enlist enrich ensnare ensure entail enter entertain entitle
    entrust entwine envisage envision envy equate equip eradicate erase erode erupt escape establish estimate etch
    evade evaluate evoke evolve exacerbate examine exceed excel exchange excite exclude excuse execute exemplify
    exempt exercise exert exhale exhaust exhibit exist expand expect expedite experience experiment expire explain
    explode exploit explore export expose express extend extract extrapolate fabricate face facilitate fade fail
    fall familiarize fasten fathom favor favour fear feed feel fetch fight figure fill filter finalize find finish
    fit fix flag flatter flee flicker fling flip float flood flourish flow fluctuate flutter fly focus fold follow
    forbid force forecast forego foresee forge forget forgive form formalize format formulate fortify foster frame
    free freeze fry fuel fulfil fulfill function fund gain gallop galvanize garner garnish gather gauge gaze gear
    generalize generate get give glance gleam glide glimmer glisten glow go govern grab grade grant grapple grasp
    gravitate greet grieve grill grin grind grip groan grow growl guarantee guard guess guide hail halt handle hang
    happen harness harvest hasten hate haul have head heal hear heat heed help hesitate hide highlight hike hinder
    hire hit hoist hold hone honor honour hope host hover howl hug hum hunch hunt hurry hurt hustle hypothesize
    identify ignite ignore illuminate illustrate imagine imitate immerse immigrate impart implement imply import
    impose impress improve improvise incite incline include incorporate increase index indicate induce infer
    influence inform infuse inhabit inhale inherit inhibit initialize initiate inject innovate inquire insert insist
    inspect inspire install instill instruct insulate integrate intend intensify interact intercept interfere
    internalize interpret interrupt intertwine intervene interview introduce invade invent invert invest investigate
    invite invoke involve irrigate isolate itemize iterate join joke jot judge juggle jump justify juxtapose keep
    kick kill kindle kiss knead kneel knit knock know label lack lament land laud laugh launch lay lead lean leap
    learn leave lend let leverage lie lift light limit linger link list listen live load loathe locate lock lodge
    log look loom loosen lose love lower lure lurk magnify maintain make manage mandate manipulate manufacture map
    marinate mark marry marvel mash master match maximise maximize mean meander measure mediate meditate meet melt
    memorize mend mention merge merit migrate mimic mince mingle minimise minimize miss mitigate mix moan mobilize
    model modernize modify mold monitor monopolize motivate mount mourn move multiply mumble murmur muster mute
    mutter name narrate narrow navigate necessitate need negate neglect negotiate nestle neutralize nod nominate
    normalize note notice notify nourish nullify nurture obey object observe obstruct obtain occupy occur offer
    offset omit open operate oppose opt optimise optimize orchestrate order organise organize orient originate
    outline outshine outweigh overcome overhaul overlap overlook oversee oversimplify overwhelm owe own pack paddle
    paint parade park participate partition pass paste patch pause pave pay peek peel peer penetrate perceive perch
    perform permit perpetuate persist persuade peruse petition pick pin pinpoint pique pitch place plan plant play
    plead please pledge plot plow plug plunge point polish ponder pop populate possess post postpone pounce pour
    practice practise praise pray preach precede preclude predict prefer prefix preheat prepare prescribe present
    preserve press presume presuppose pretend prevail prevent print prioritise prioritize probe proceed process
    procure produce program progress prohibit project promise promote prompt pronounce proofread propagate propel
    propose prosper protect protest prove provide provoke prowl prune publicize publish pull pump punish purchase
    purify pursue push put qualify quantify quantize quench query question queue quit quiver quote radiate raise
    rally ramble rank ratify ration rationalize rattle reach react read reaffirm realise realize reap rearrange
    reassess reassure rebuild recall recap receive recite reckon recline recognise recognize recommend reconcile
    reconsider reconstruct record recount recover recreate recruit rectify recur recycle redefine redesign redirect
    rediscover reduce refactor refer refine reflect reform refrain reframe refresh refuse refute regain regard
    register regret regulate reimagine reimburse reinforce reiterate reject rejoice rekindle relate relax relay
    release relieve relinquish relish relocate rely remain remedy remember remind remove render renew renovate rent
    reopen reorganize repair repay repeat repel rephrase replace replenish replicate reply report reposition
    represent reprint request require rescue research resell resemble reserve reset reshape reside resign resist
    resolve resonate resort respect respond rest restart restate restore restrain restrict restructure result resume
    resurrect retain retell rethink retire retreat retrieve return reunite reuse revamp reveal revel revere reverse
    review revise revisit revitalize revive revolve reward rewrite ride ridicule ring rinse rip ripple rise risk
    roam roast rob roll rotate rouse rub ruin rule rumble run rush safeguard sail salute sample satisfy saunter
    sauté save savor savour say scale scan scatter schedule scoff scold scour scowl scramble scrape scratch scream
    screen scroll scrutinize scurry sear search secure see seek seem segment seize select sell send sense separate
    sequence serve set settle sew shake shape share sharpen shatter shed shield shift shimmer shine ship shiver
    shoot shop shorten shout shove show showcase shred shriek shrink shudder shuffle shun shut sift sigh sign signal
    simmer simplify simulate sing sink siphon sit situate sketch skim skip slam slash slay sleep slice slide slip
    slither slow slump smash smell smile smirk smoke smooth smother snap snarl snatch sneak sneer sniff snore soak
    soar sob solidify solve soothe sort sound sow spare spark sparkle spawn speak spearhead specialise specialize
    specify speculate speed spell spend spice spill spin split spoil sponsor spot sprawl spread spring sprinkle
    sprint squander squeal squeeze squint stabilize stack stagger stammer stand standardize stare start startle
    state stay steal steam steer stem step stick stimulate stipulate stir stomp stop store storm strain strategize
    stray streamline strengthen stress stretch strike strip strive stroll struggle strut study stuff stumble
    subdivide subdue submerge submit subscribe subside subsidize substantiate substitute subtract succeed suffer
    suggest suit sulk summarise summarize summon supervise supplement supply support suppose suppress surge surmise
    surpass surrender surround survey survive suspect suspend sustain swallow swap sway swear sweep swim swing swirl
    switch swoop symbolise symbolize synchronize synthesize tabulate tackle tag tailor take talk tally tame tap
    target taste teach tear tease tell tempt tend terminate test testify thank theorize think thrill thrive throw
    thump thwart tie tighten tinker tiptoe tolerate torment toss touch tour trace track trade train trample
    transcend transcribe transfer transform transition translate transmit trap travel traverse treasure treat
    tremble trickle trigger trim triple trot trudge trust try tuck tumble tune turn tweak twirl twist type uncoil
    uncork uncover undergo underline underscore understand undertake unearth unfold unfurl unify unite unleash
    unlock unpack unravel unveil unwind unwrap update upgrade uphold upload uproot urge use usher usurp utilise
    utilize utter vacate vacuum validate vanish vary venerate venture verify view vindicate visit visualise
    visualize voice volunteer vote vow wage wait wake walk waltz wander wane want warm warn wash waste watch waver
    weaken wear weave weep weigh welcome whine whip whir whisk whisper whistle widen wield win wince wipe wish
    withdraw wither withhold withstand witness wonder work worry worsen worship wrangle wrap wreak wrestle write
    yank yawn yearn yell yield zoom
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
