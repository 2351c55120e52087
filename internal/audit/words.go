package audit

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/eni-guard/eni-guard/internal/review"
	"github.com/eni-guard/eni-guard/internal/sandbox"
	"github.com/eni-guard/eni-guard/webhook"
)

// timeLayout is how times are printed, in UTC.
const timeLayout = "2006-01-02 15:04:05"

func at(t time.Time) string { return t.UTC().Format(timeLayout) }

// printable replaces what would do something on a terminal: names, user agents and reasons are what somebody has sent.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// askedWords say what the filters ask for; nothing if they ask for everything.
func (q question) askedWords() string {
	var all []string
	for _, at := range []struct {
		what string
		time time.Time
	}{{"since", q.filter.Since}, {"until", q.filter.Until}} {
		if !at.time.IsZero() {
			all = append(all, at.what+" "+at.time.UTC().Format(timeLayout)+" UTC")
		}
	}
	for _, list := range []struct {
		what  string
		words []string
	}{{"namespace", q.namespaces}, {"user", q.users}, {"node", q.nodes}, {"pod", q.pods}, {"decision", q.decisions}, {"verdict", q.verdicts}} {
		if len(list.words) > 0 {
			all = append(all, list.what+" "+strings.Join(list.words, " or "))
		}
	}
	return strings.Join(all, ", ")
}

// logWords say what was read, and what of it the report is about.
func (d document) logWords() string {
	text := logWords(d.log)
	if d.asked != "" {
		text += "; only " + d.asked
	}
	if d.interrupted {
		text += "; interrupted, so not to its end"
	}
	return text
}

// noneWords say that the report has no removal; that must not be taken for a log without any.
func (d document) noneWords() string {
	if d.asked != "" {
		return "no forced removals among those asked for"
	}
	return "no forced removals"
}

func count(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// userWords names a user, and who acted as that user.
func userWords(user, by string) string {
	if by == "" {
		return user
	}
	return user + " (by " + by + ")"
}

func orUnknown(text string) string {
	if text == "" {
		return "?"
	}
	return text
}

// thenWords says what became of a pod.
func thenWords(then *review.Then) string {
	if then == nil {
		return ""
	}
	after := time.Duration(then.After * float64(time.Second)).Round(10 * time.Millisecond)
	if after > time.Minute {
		after = after.Round(time.Second)
	}
	text := ""
	switch then.How {
	case review.HowEnded:
		text = fmt.Sprintf("ended %s later (%s)", after, then.By)
	case review.HowFreed:
		text = fmt.Sprintf("ended and was freed %s later", after)
	case review.HowStripped:
		text = fmt.Sprintf("its finalizers were taken away %s later by %s", after, then.By)
	case review.HowForced:
		text = fmt.Sprintf("removed by force %s later by %s, %s", after, then.By, then.Decision)
	}
	if then.Override != "" {
		text += fmt.Sprintf(", after the override %q", then.Override)
	}
	if then.ByName {
		text += ", if it was the same pod: only the name tells"
	}
	return text
}

// thereWords says what was on the node when a pod was removed by an override.
func thereWords(r review.Removal) string {
	switch {
	case r.Evidence != "":
		return r.Evidence
	case r.Verdict == string(sandbox.Released):
		return "nothing was left on the node"
	default:
		return "no webhook answered, so nobody looked at the node"
	}
}

// outcomeWords says how a request has ended that was not kept from removing the pod, unless it has just removed it.
func outcomeWords(r review.Removal) string {
	switch r.Outcome {
	case review.OutcomeFailed:
		return fmt.Sprintf(". The API server has refused it with %d", r.Code)
	case review.OutcomeHeld:
		return ". The object stays until its finalizers are taken away: " + strings.Join(r.Finalizers, ", ")
	case review.OutcomeUntold:
		return ". The log does not say whether that pod went"
	default:
		return ""
	}
}

// stayedAs says why a pod stayed: by the decision, or by what came after it.
func stayedAs(r review.Removal) string {
	switch {
	case r.Outcome == review.OutcomeFailed:
		return fmt.Sprintf("%s, and failed with %d", r.Decision, r.Code)
	case r.Outcome == review.OutcomeHeld && r.Decision != review.Decision(webhook.Held):
		return string(r.Decision) + ", and held by " + strings.Join(r.Finalizers, ", ")
	default:
		return string(r.Decision)
	}
}

// stayedWords says what became of a pod that stayed; also where the log does not tell.
func stayedWords(r review.Removal) string {
	if r.Then == nil {
		return "nothing in the log says that it has gone"
	}
	return thenWords(r.Then)
}

// slippedWords says why the guard was not asked.
func slippedWords(reason string) string {
	switch reason {
	case string(webhook.ReasonModeOff):
		return "the namespace was off"
	case review.ReasonWebhookDown:
		return "no webhook answered, and the failure policy is Ignore"
	case review.ReasonConfigurationDeleted:
		return "the webhook configuration was deleted"
	case review.ReasonConfigurationNarrowed:
		return "what the guard is asked about was changed"
	case review.ReasonImpersonated:
		return "somebody acted as a kubelet or as the guard itself, which the guard trusts"
	case review.ReasonNoTrace:
		return "the log does not say why: the guard was not installed, or was switched off before the log begins"
	default:
		return reason
	}
}

// untoldWords say what the log does not have.
func untoldWords(u review.Untold) []string {
	var all []string
	for _, c := range []struct {
		n          int64
		what, lack string
	}{
		{u.Deletes, "delete", " of pods: the log has neither a decision nor the pod"},
		{u.Collections, "delete", " of collections of pods: the log does not have which pods"},
		{u.Evictions, "eviction", " without a decision: the log does not have the pod"},
		{u.Records, "decision", ", cut off when written"},
		{u.Unmatched, "removal", " that may be among those asked for: the log does not have the node, pod or UID"},
	} {
		if c.n > 0 {
			all = append(all, count(int(c.n), c.what)+c.lack)
		}
	}
	return all
}
