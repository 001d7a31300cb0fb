;;; deepseek-lsp.el --- Ghost text and completions from a model on your own machine -*- lexical-binding: t; -*-

;; Version: 0.1.0
;; Package-Requires: ((emacs "28.1") (lsp-mode "10.0.0"))

;;; Commentary:

;; A client of `lsp-mode' for the server deepseek-lsp.  With this folder in `load-path':
;;
;;   (require 'deepseek-lsp)
;;   (add-hook 'prog-mode-hook #'deepseek-lsp-start)
;;
;; It runs beside a language's own server.  In ghost text TAB takes the suggestion.

;;; Code:

(require 'lsp-mode)
(require 'lsp-inline-completion)

(defgroup deepseek-lsp nil
  "Ghost text and completions from a model on your own machine."
  :group 'lsp-mode)

(defcustom deepseek-lsp-command '("deepseek-lsp")
  "The server and its arguments."
  :type '(repeat string))

(defcustom deepseek-lsp-settings nil
  "Settings of the server, as a property list: (:inline (:max_lines 3))."
  :type 'plist)

(defun deepseek-lsp--options ()
  "The settings as an object, an empty one when there are none."
  (or deepseek-lsp-settings (make-hash-table)))

(lsp-register-client
 (make-lsp-client
  :new-connection (lsp-stdio-connection (lambda () deepseek-lsp-command))
  :activation-fn (lambda (_file mode) (provided-mode-derived-p mode 'prog-mode))
  :initialization-options #'deepseek-lsp--options
  :add-on? t
  :server-id 'deepseek-lsp))

;;;###autoload
(defun deepseek-lsp-start ()
  "Start `lsp-mode' in this buffer, with ghost text."
  (lsp)
  (lsp-inline-completion-mode 1))

(defun deepseek-lsp-status ()
  "Say how the server stands, and why nothing was shown."
  (interactive)
  (let ((workspace (lsp-find-workspace 'deepseek-lsp nil)))
    (if (and workspace (eq (lsp--workspace-status workspace) 'initialized))
        (deepseek-lsp--say (with-lsp-workspace workspace (lsp-request "deepseek/status" nil)))
      (message (if workspace "deepseek-lsp is being started." "deepseek-lsp does not run here: M-x deepseek-lsp-start")))))

(defun deepseek-lsp--say (status)
  "Say in a message what the server's STATUS is."
  (let ((reason (lsp-get (lsp-get status :last) :reason)))
    (message "deepseek-lsp is %s. %s%s" (lsp-get status :state) (lsp-get status :message)
             (if (string-empty-p reason) "" (concat " Last time nothing was shown: " reason)))))

(define-key lsp-inline-completion-active-map (kbd "TAB") #'lsp-inline-completion-accept)
(define-key lsp-inline-completion-active-map (kbd "<tab>") #'lsp-inline-completion-accept)

(provide 'deepseek-lsp)
;;; deepseek-lsp.el ends here
