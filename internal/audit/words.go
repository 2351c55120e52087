package audit

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/eni-guard/eni-guard/internal/review"
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

// stayedWords says what became of a pod that stayed; also where the log does not tell.
func stayedWords(r review.Removal) string {
	if r.Then == nil {
		return "still there when the log ends"
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
		n    int64
		what string
	}{
		{u.Deletes, "%d deletes of pods: the log has neither a decision nor the pod"},
		{u.Collections, "%d deletes of collections of pods: the log does not have which pods"},
		{u.Evictions, "%d evictions without a decision: the log does not have the pod"},
		{u.Records, "%d decisions that were cut off when they were written"},
	} {
		if c.n > 0 {
			all = append(all, fmt.Sprintf(c.what, c.n))
		}
	}
	return all
}
