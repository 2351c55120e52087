package auditlog

import (
	"bytes"
	"slices"
)

// Selection says which events the review needs. It errs on the side of too many: what it keeps is parsed and judged by the
// review, what it leaves out is lost.
type Selection struct {
	// GuardNamespace is where the guard's own workloads are.
	GuardNamespace string
	// All also keeps those whose content does not matter, to see how they are recorded.
	All bool
}

var (
	canonicalHead = []byte(`{"kind":"Event","apiVersion":"` + knownVersion + `",`)
	eventHead     = []byte(`{"kind":"Event`)
	verbKey       = []byte(`"verb":"`)
	refKey        = []byte(`,"objectRef":{"`)
	resourceKey   = []byte(`,"objectRef":{"resource":"`)
	eviction      = []byte(`"eviction"`)
	guardWord     = []byte("eni-guard")
	quotedVersion = []byte(`"` + knownVersion + `"`)
	// podWords are in a change of a pod that may matter: overrides, the label by which Terway lets go, and finalizers.
	podWords = [][]byte{guardWord, []byte("ignore-by-terway"), []byte("finalizers")}
	// nodeWords are the taint and the labels by which nodes are taken out of the guard's care.
	nodeWords = [][]byte{[]byte("node.kubernetes.io/out-of-service"), []byte("virtual-kubelet"), []byte("windows")}
	// anyWords has one word of every event that may matter.
	anyWords = slices.Concat(podWords, nodeWords, [][]byte{
		[]byte("delete"), []byte("eviction"), []byte("validatingwebhookconfigurations"), []byte("validatingadmissionpolic"), []byte("rbac.authorization.k8s.io"),
	})
)

// mayMatter says whether a line, as the API server writes it, may be of an event that the review needs. Only where verb and resource are where
// the API server's encoder puts them, in the order of the fields of its Event, the line is left out; what is written in any other way is kept.
func (s Selection) mayMatter(text []byte) bool {
	verb, rest, ok := canonicalVerb(text)
	if !ok {
		return true
	}
	if !writes(verb) {
		return false
	}
	resource, rest, ok := canonicalResource(rest)
	if !ok {
		return true
	}
	switch string(resource) {
	case "pods":
		switch string(verb) {
		case "delete", "deletecollection":
			return true
		case "create":
			return bytes.Contains(rest, eviction)
		default:
			return s.All || mentions(rest, podWords)
		}
	case "namespaces":
		return s.All || mentions(rest, [][]byte{guardWord, []byte(s.GuardNamespace)})
	case "nodes":
		return s.All || string(verb) == "delete" || string(verb) == "deletecollection" || mentions(rest, nodeWords)
	case "validatingwebhookconfigurations", "validatingadmissionpolicies", "validatingadmissionpolicybindings",
		"clusterroles", "roles", "clusterrolebindings", "rolebindings":
		return true
	case "deployments", "daemonsets":
		return bytes.Contains(rest, []byte(s.GuardNamespace))
	default:
		return false
	}
}

// canonicalVerb goes through the fields before the verb and returns that, and what follows it. Callers choose the audit ID and the address, so
// their ends are looked for; a verb with an escape is not what the API server writes.
func canonicalVerb(text []byte) (verb, rest []byte, ok bool) {
	if rest, ok = bytes.CutPrefix(text, canonicalHead); !ok {
		return nil, nil, false
	}
	for _, key := range []string{`"level":"`, `"auditID":"`, `"stage":"`, `"requestURI":"`} {
		if rest, ok = bytes.CutPrefix(rest, []byte(key)); !ok {
			return nil, nil, false
		}
		if rest = afterText(rest); len(rest) == 0 || rest[0] != ',' {
			return nil, nil, false
		}
		rest = rest[1:]
	}
	if rest, ok = bytes.CutPrefix(rest, verbKey); !ok {
		return nil, nil, false
	}
	verb, rest, ok = bytes.Cut(rest, []byte(`"`))
	return verb, rest, ok && bytes.IndexByte(verb, '\\') < 0 && bytes.HasPrefix(rest, []byte(`,"user":{`))
}

// afterText is what follows a text of JSON, from behind its first quote on; nothing if it has no end.
func afterText(text []byte) []byte {
	for {
		end := bytes.IndexByte(text, '"')
		if end < 0 {
			return nil
		}
		escapes := 0
		for escapes < end && text[end-1-escapes] == '\\' {
			escapes++
		}
		if escapes%2 == 0 {
			return text[end+1:]
		}
		text = text[end+1:]
	}
}

// canonicalResource returns the resource, and what follows it. Before it there are only texts and lists of texts, in which its key cannot stand:
// no quote is one there. Bodies can have it, and follow it.
func canonicalResource(text []byte) (resource, rest []byte, ok bool) {
	at := bytes.Index(text, refKey)
	if at < 0 || !bytes.HasPrefix(text[at:], resourceKey) ||
		bytes.Contains(text[:at], []byte(`"requestObject"`)) || bytes.Contains(text[:at], []byte(`"responseObject"`)) {
		return nil, nil, false
	}
	resource, rest, ok = bytes.Cut(text[at+len(resourceKey):], []byte(`"`))
	return resource, rest, ok && bytes.IndexByte(resource, '\\') < 0
}

func writes(verb []byte) bool {
	switch string(verb) {
	case "delete", "deletecollection", "create", "update", "patch":
		return true
	}
	return false
}

// valueOf returns the text behind a key; nothing if the key is not there.
func valueOf(text, key []byte) []byte {
	_, text, _ = bytes.Cut(text, key)
	value, _, ended := bytes.Cut(text, []byte(`"`))
	if !ended {
		return nil
	}
	return value
}

// mayMatterAnyhow is mayMatter for a line that is written in another order, or with spaces.
func (s Selection) mayMatterAnyhow(text []byte) bool {
	return s.All || mentions(text, anyWords) || bytes.Contains(text, []byte(s.GuardNamespace))
}

// mentions says whether one of the words is in a text, or may be: a patch is in the log as its sender has written it, and any letter can be
// written as an escape.
func mentions(text []byte, words [][]byte) bool {
	for _, word := range words {
		if bytes.Contains(text, word) {
			return true
		}
	}
	return escapesLetters(text)
}

// escapesLetters says whether something is written as an escape that nobody needs. The API server's encoder escapes &, < and >, two kinds of ends of
// lines, and what cannot be printed.
func escapesLetters(text []byte) bool {
	for {
		at := bytes.Index(text, []byte(`\u`))
		if at < 0 {
			return false
		}
		text = text[at+2:]
		if len(text) < 4 {
			return true
		}
		switch string(bytes.ToLower(text[:4])) {
		case "0026", "003c", "003e", "2028", "2029":
		default:
			if text[0] == '0' && text[1] == '0' && text[2] >= '2' && text[2] <= '7' {
				return true
			}
		}
	}
}
