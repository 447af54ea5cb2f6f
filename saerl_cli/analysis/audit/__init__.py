"""Which features caused the reward: variants of a policy, keep-only curves, controls, interactions, agreement.

A variant is the policy with each of its coefficients scaled, mostly by 0 or 1. All variants answer the same prompts
with the same random numbers, so that differences are taken prompt by prompt; standard errors are over prompts.

RUN/audit.json (`saerl audit`) holds, with `X_se` the standard error of X:

    version         1
    policy, adapter, splice, seed, prompts          what was audited, with so many prompts
    features        {total, touched, moved}         coefficients, those not exactly 1, those that moved (`MOVED`)
    gain            {reward_reference (over several draws), reward, gain (`Gain.over`), kl, loss_reference, loss,
                    loss_increase, …_se}
    completeness    {attributed, attributed_se, difference, difference_se}   sum of all attributions, and minus the gain
    reverts         a list, {site, feature, delta, attribution, attribution_se, share, effect, reward, kl, loss: change
                    when the feature is reverted, with _se; fires_on, attribute, f1, kind}
    curves          {keep, remove, keep_by_effect, keep_random, keep_matched: a list of {n, gain, share, share_se}}:
                    what is left of the gain; keep the first n, remove the first n, ...; controls also have `spread`,
                    the standard deviation over draws, matched ones `effect_ratio`, their effect over that of the kept
    needed          {"50", "90", "99": {n, low, high, without, random, matched, matched_effect} or null}: the fewest
                    first features, of those numbers tried, that carry so many per cent of the gain; the same for the
                    ends of 95 % intervals (high may be null); the share left without them, and with as many control
                    features (matched_effect: their effect over that of the first)
    pairs           a list, {first, second, joint: change when both are reverted, interaction: minus the sum of the two
                    alone; kept_joint, kept_interaction: the same when they are all that is kept, against the reference}
    peers           a list, {policy, seed, delta: Spearman correlation over all features; sites: {SITE: {delta, top: k,
                    top_overlap, top_expected: of the k largest |delta|}}; where the peer has been audited too,
                    attribution: Spearman correlation, attribution_top: overlap of the 100 largest}
    side_effects    {full, needed_90: {gain, kl, loss_increase, kl_per_gain, loss_per_gain, length, distinct_2: changes;
                    with a planted model attributes: {name: change of its share of all words}, rewarded_change, ratio:
                    summed |change| of other attributes over that of the rewarded, ratio_by_chance: with the reference
                    sampled twice}}
    shares          {by_kind, by_place, by_direction, by_role, by_attribute: {name: {features, attribution, share,
                    effect_share}}}: summed attribution; by the tokens features fire on, whether on or before rewarded
                    tokens, whether they write towards or away from them, and by the attribute they detect
    attributions    {SITE: [attribution of every feature]}, to four digits

The unit of rewards is that of the reward; KL is in nats a completion, loss in nats a token.
"""

VERSION = 1
