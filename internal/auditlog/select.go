package auditlog

import "bytes"

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
	resourceKey   = []byte(`"objectRef":{"resource":"`)
	eviction      = []byte(`"eviction"`)
	guardWord     = []byte("eni-guard")
	ignoreWord    = []byte("ignore-by-terway")
	quotedVersion = []byte(`"` + knownVersion + `"`)
	// nodeWords are the taint and the labels by which nodes are taken out of the guard's care.
	nodeWords = [][]byte{[]byte("node.kubernetes.io/out-of-service"), []byte("virtual-kubelet"), []byte("windows")}
	// anyWords has one word of every line that may matter.
	anyWords = [][]byte{[]byte("delete"), eviction[1 : len(eviction)-1], guardWord, ignoreWord, nodeWords[0], nodeWords[1], nodeWords[2]}
)

// mayMatter says whether a line, as the API server writes it, may be of an event that the review needs. Verb and resource are looked
// for as the API server's encoder puts them: in the order of the fields of its Event. Neither text can stand before them
// in a value that a caller makes up, because there its quotes are escaped.
func (s Selection) mayMatter(text []byte) bool {
	verb, rest := valueOf(text, verbKey)
	if len(verb) == 0 || !writes(verb) {
		return false
	}
	resource, rest := valueOf(rest, resourceKey)
	switch string(resource) {
	case "pods":
		switch string(verb) {
		case "delete", "deletecollection":
			return true
		case "create":
			return bytes.Contains(rest, eviction)
		default:
			return s.All || bytes.Contains(rest, guardWord) || bytes.Contains(rest, ignoreWord)
		}
	case "namespaces":
		return s.All || bytes.Contains(rest, guardWord)
	case "nodes":
		return s.All || string(verb) == "delete" || containsAny(rest, nodeWords)
	case "validatingwebhookconfigurations", "validatingadmissionpolicies", "validatingadmissionpolicybindings":
		return true
	case "deployments", "daemonsets":
		return bytes.Contains(rest, []byte(s.GuardNamespace))
	default:
		return false
	}
}

func writes(verb []byte) bool {
	switch string(verb) {
	case "delete", "deletecollection", "create", "update", "patch":
		return true
	}
	return false
}

// valueOf returns the text behind a key, and what follows it; nothing if the key is not there.
func valueOf(text, key []byte) (value, rest []byte) {
	start := bytes.Index(text, key)
	if start < 0 {
		return nil, nil
	}
	text = text[start+len(key):]
	end := bytes.IndexByte(text, '"')
	if end < 0 {
		return nil, nil
	}
	return text[:end], text[end:]
}

// mayMatterAnyhow is mayMatter for a line that is written in another order, or with spaces.
func (s Selection) mayMatterAnyhow(text []byte) bool {
	return s.All || containsAny(text, anyWords) || bytes.Contains(text, []byte(s.GuardNamespace))
}

func containsAny(text []byte, words [][]byte) bool {
	for _, word := range words {
		if bytes.Contains(text, word) {
			return true
		}
	}
	return false
}
